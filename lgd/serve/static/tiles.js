// The tiles of a slide as a table: the heatmap for those who do not see it.
import { addParameters, attempt, get } from "./api.js";
import { find, formatNumber, formatPercent, formatWhole, make, makePages } from "./dom.js";

const LIMIT = 20;
// What a click on a column's title asks for next.
const NEXT = { number: "-grade", "-grade": "grade", grade: "number" };
const ORDER = { number: null, grade: "ascending", "-grade": "descending" };

let newest = 0;

const capitalise = (word) => word[0].toUpperCase() + word.slice(1);

function explainGrade({ kind, classes }) {
  const shown = "The number of a tile shows it on the slide.";
  if (kind !== "ordinal") return shown;
  const last = classes.length - 1;
  return `${shown} Grade: the mean of the classes by their probability, from 0 for ${classes[0]} to ${last} for ${classes[last]}.`;
}

// `show(row)` moves the view to a tile and queries it.
export async function showTiles(path, target, show, offset = 0, sort = "number") {
  const number = ++newest;
  const page = await attempt(() => get(addParameters(`${path}/rows`, { offset, limit: LIMIT, sort })));
  if (!page || number !== newest) return;
  const again = (to, by) => showTiles(path, target, show, to, by);
  const sorter = make("button", { type: "button", onclick: () => again(0, NEXT[sort]) }, "Grade");
  const titles = ["Tile", "Place (px)", capitalise(target.label_word), sorter, ...target.classes, "Tissue"];
  const head = titles.map((title) =>
    make("th", { scope: "col", "aria-sort": title === sorter ? ORDER[sort] : null }, title),
  );
  const table = make(
    "table",
    { "aria-labelledby": "tiles-title" },
    make("thead", {}, make("tr", {}, head)),
    make(
      "tbody",
      {},
      page.rows.flatMap((row) => makeRows(row, target, show, titles.length)),
    ),
  );
  const focused = find("tiles").contains(document.activeElement) && document.activeElement.textContent;
  find("tiles").replaceChildren(
    make("p", { class: "explained" }, explainGrade(target)),
    make("div", { class: "wide", role: "region", "aria-label": "Table of tiles", tabindex: "0" }, table),
    makePages(offset, LIMIT, page.total, (to) => again(to, sort)),
  );
  if (focused) [...find("tiles").querySelectorAll("button")].find((one) => one.textContent === focused)?.focus();
}

// A row of numbers, and one of notes where there are any: beside the numbers they would be cut off.
function makeRows(row, target, show, columns) {
  const label = row.label === null ? "no answer" : typeof row.label === "number" ? formatNumber(row.label) : row.label;
  const notes = [row.notes, row.error].flat().filter(Boolean).join("; ");
  const doubted = target.doubts.some((note) => notes.includes(note));
  const cells = [
    `${formatWhole(row.x)}, ${formatWhole(row.y)}`,
    label,
    formatNumber(row.grade),
    ...target.classes.map((name) => formatPercent(row.probabilities?.[name] ?? null)),
    formatPercent(row.tissue),
  ];
  const name = `Show tile ${row.number}`;
  const button = make("button", { type: "button", "aria-label": name, onclick: () => show(row) }, `${row.number}`);
  const numbers = make(
    "tr",
    { class: doubted ? "doubted" : null },
    make("th", { scope: "row" }, button),
    cells.map((text) => make("td", {}, text)),
  );
  return notes
    ? [numbers, make("tr", { class: "note" }, make("td", { colspan: columns }, `Tile ${row.number}: ${notes}`))]
    : [numbers];
}
