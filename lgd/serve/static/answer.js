// The panel of an answer: what was asked, what the network says of it, and the nearest known IHC.
import { attempt, makeImage } from "./api.js";
import { find, formatLabel, formatNumber, formatPercent, listNotes, make } from "./dom.js";

const EXPLAINED =
  "Below each label: its slide and split; the distance, 0 where the two latents are alike and 1 where they are unrelated; " +
  "and the name of its file, in which a word such as test says nothing of the split.";

let newest = 0;

// Ask, and show the answer unless another question came in between; null then, and where the answer is an error.
// `asked`: what the question is about, in words (title), and its H&E as url or file (image).
export async function showQuery(asked, target, ask) {
  const number = ++newest;
  find("answer").setAttribute("aria-busy", "true");
  fill(make("p", { role: "status" }, `The network looks at ${asked.title}.`));
  const answer = await attempt(ask);
  if (number !== newest) return null;
  if (answer) showAnswer(answer, target, asked);
  else clearAnswer();
  return answer ?? null;
}

export function clearAnswer() {
  newest += 1;
  find("answer").removeAttribute("aria-busy");
  fill(make("p", {}, "The nearest known IHC stands here after a query."));
}

const fill = (...parts) => find("answer").replaceChildren(make("h2", {}, "Answer"), ...parts.filter((part) => part));

// The notes beside which an answer is not to be believed, such as that of glass.
const findDoubts = (answer, target) => (answer.notes ?? []).filter((note) => target.doubts.includes(note));

function showAnswer(answer, target, asked) {
  const word = target.label_word;
  const doubts = findDoubts(answer, target);
  const doubted = doubts.length > 0;
  const expected = describeLabel(answer[word], unitOf(answer, target), word);
  const said = doubted ? `${doubts.join("; ")}. Not to be believed: ${expected}` : expected;
  const unit = unitOf(answer, target);
  find("answer").removeAttribute("aria-busy");
  fill(
    make("p", { role: "status" }, `${asked.title}: ${said}.`),
    doubted ? listNotes(answer.notes) : null,
    make(
      "div",
      { class: "asked" },
      makeFigure(asked.image, `H&E of ${asked.title}`, "H&E"),
      answer.stored ? makeOwn(answer.stored, word, unit) : null,
      make("div", { class: doubted ? "network doubted" : "network" }, describeNetwork(answer, target, unit, doubted)),
    ),
    doubted ? null : listNotes(answer.notes),
    ...describeNeighbours(answer, word, unit, doubted),
  );
  find("answer").scrollTop = 0;
}

const unitOf = (answer, target) => answer.unit ?? target.unit;

const describeLabel = (label, unit, word) =>
  label === null || label === undefined
    ? `the network states no ${word}`
    : `the network expects ${word} ${formatLabel(label, unit)}`;

const makeFigure = (source, alt, ...caption) =>
  make("figure", {}, makeImage(source, alt), make("figcaption", {}, ...caption));

// The patch's own IHC and label: the truth beside the guess.
function makeOwn(stored, word, unit) {
  const label = `${word} ${formatLabel(stored[word], unit)}`;
  if (!stored.ihc) return make("p", {}, `Its own ${label}; it has no IHC.`);
  return makeFigure(stored.ihc, `Own IHC of patch ${stored.key}, ${label}`, "Own IHC, ", make("strong", {}, label));
}

function describeNetwork(answer, target, unit, doubted) {
  const label = answer[target.label_word];
  const parts = [make("h3", {}, "What the network expects")];
  if (label !== null && label !== undefined) {
    const shown = formatLabel(label, unit);
    parts.push(doubted ? make("p", {}, `not to be believed: ${shown}`) : make("p", { class: "label" }, shown));
  }
  if (answer.probabilities && Object.keys(answer.probabilities).length)
    parts.push(makeShares(answer.probabilities, "Probability"));
  const range = answer.label_set ?? answer.interval;
  if (range) {
    const text = range.map((one) => formatLabel(one, unit)).join(target.kind === "number" ? " to " : ", ");
    parts.push(make("p", {}, target.kind === "number" ? `Interval: ${text}` : `Label set, not excluded: ${text}`));
  }
  return parts;
}

// A row for each class: name, share and a bar. Of a slide the shares are intervals.
export function makeShares(shares, title) {
  const rows = Object.entries(shares).map(([name, share]) => {
    const value = typeof share === "object" && share !== null ? share.value : share;
    const range =
      value !== share && share?.low !== null ? ` (${formatPercent(share.low)} to ${formatPercent(share.high)})` : "";
    const bar = make("meter", { min: 0, max: 1, value: value ?? 0, "aria-hidden": "true" });
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, name),
      make("td", {}, formatPercent(value) + range),
      make("td", {}, bar),
    );
  });
  const ranged = Object.values(shares).some((share) => (share?.low ?? null) !== null);
  const column = make("th", { scope: "col", colspan: "2" }, ranged ? `${title} (95 % interval)` : title);
  const head = make("tr", {}, make("th", { scope: "col" }, "Class"), column);
  return make("table", { class: "shares" }, make("thead", {}, head), make("tbody", {}, rows));
}

function describeNeighbours(answer, word, unit, doubted) {
  const { neighbours, vote, chance } = answer;
  if (!neighbours) return [];
  const parts = [make("h3", {}, "Nearest known IHC")];
  if (!neighbours.length) return [...parts, make("p", {}, "There is none to compare with.")];
  if (vote && vote.labelled) {
    const bits = vote.entropy_bits === null ? "" : `, entropy ${formatNumber(vote.entropy_bits)} bits`;
    const text = `${doubted ? "Not to be believed: vote" : "Vote"} of ${vote.labelled} labelled: ${word} ${formatLabel(vote[word], unit)}${bits}.`;
    parts.push(make("p", { class: doubted ? "vote doubted" : "vote" }, text));
  }
  if (chance) parts.push(make("p", { class: doubted ? "chance doubted" : "chance" }, `${chance.replace(/\.$/, "")}.`));
  parts.push(make("p", { class: "explained" }, EXPLAINED));
  parts.push(
    make(
      "ol",
      { class: "neighbours" },
      neighbours.map((one) => makeNeighbour(one, word, unit)),
    ),
  );
  return parts;
}

function makeNeighbour(neighbour, word, unit) {
  const label = `${word} ${formatLabel(neighbour[word], unit)}`;
  const stain = neighbour.ihc ? "IHC" : "H&E";
  const slide = neighbour.slide ?? "unknown slide";
  const twin = neighbour.duplicate_of;
  const facts = [
    make("strong", {}, `${stain}, ${label}`),
    make("span", {}, `${slide}, ${neighbour.split}`),
    make("span", {}, `distance ${formatNumber(neighbour.distance, 3)}`),
    make("span", { class: "key" }, neighbour.key),
    twin ? make("span", { class: "note" }, `near-duplicate of ${twin === "query" ? "the query" : twin}`) : null,
    neighbour.hub ? make("span", { class: "note" }, neighbour.hub) : null,
  ];
  const image = makeImage(neighbour.ihc ?? neighbour.he, `${stain} of ${neighbour.key}, ${label}, slide ${slide}`);
  return make("li", {}, image, make("div", {}, facts));
}
