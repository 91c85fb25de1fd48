// One slide: its view, overlays, score, downloads and tiles, and the queries of its places.
import { addParameters, attempt, download, get, post } from "./api.js";
import { makeShares, showQuery } from "./answer.js";
import { find, formatLabel, formatNumber, formatPercent, formatWhole, listNotes, make } from "./dom.js";
import { showLegend } from "./legend.js";
import { describeState, pathOf } from "./slides.js";
import { showTiles } from "./tiles.js";
import { SlideViewer } from "./viewer.js";

export class SlidePage {
  // `settle(id, view)` is called when the view has come to rest, `refresh()` when a slide was sent to be scored.
  constructor(model, { settle, refresh }) {
    this.model = model;
    this.slide = null;
    this.wanted = null;
    this.viewer = new SlideViewer({ query: (x, y) => this.queryPlace(x, y), settle });
    find("score-slide").addEventListener("click", () =>
      attempt(async () => {
        this._update(await post(`${pathOf(this.slide.id)}/score`));
        refresh();
      }),
    );
    find("overlay").addEventListener("change", () => this._showOverlay(find("overlay").value));
    const setOpacity = () => this.viewer.setOpacity(find("opacity").value / 100);
    find("opacity").addEventListener("input", setOpacity);
    // A browser may have kept what was chosen before the page was loaded again.
    setOpacity();
    for (const button of find("slide-score").querySelectorAll("[data-file]")) {
      const file = button.dataset.file;
      button.addEventListener("click", () =>
        attempt(() => download(`${pathOf(this.slide.id)}/${file}`, `${this.slide.name}-${file}`)),
      );
    }
  }

  async open(id, view = null) {
    if (this.wanted === id) {
      if (view && this.slide) this.viewer.moveTo(view.x, view.y, view.zoom);
      return;
    }
    this.wanted = id;
    this.slide = null;
    try {
      const slide = await get(pathOf(id));
      if (this.wanted !== id) return;
      // A damaged slide has no size, and only a name and a problem to show.
      find("look").hidden = !slide.width;
      if (slide.width) await this.viewer.open(slide, pathOf(id), view);
      if (this.wanted === id) this._update(slide);
    } catch (error) {
      if (this.wanted === id) this.wanted = null;
      throw error;
    }
  }

  // Fetch the slide's document again, when the list says that its state changed.
  async follow(slides) {
    const listed = this.slide && slides.find(({ id }) => id === this.slide.id);
    if (!listed) return;
    if (listed.state === this.slide.state) find("slide-state").textContent = this._describe(listed);
    else this._update(await get(pathOf(listed.id)));
  }

  _describe(slide) {
    return slide.problem ? `${slide.state}: ${slide.problem}` : describeState(slide);
  }

  _update(slide) {
    // Another slide was opened in the meantime.
    if (slide.id !== this.wanted) return;
    this.slide = slide;
    find("slide-name").textContent = slide.name;
    find("slide-state").textContent = this._describe(slide);
    find("score-slide").hidden = !slide.width || !["unscored", "failed"].includes(slide.state);
    this._offerOverlays();
    find("slide-score").hidden = !slide.score;
    if (!slide.score) return;
    find("score").replaceChildren(...describeScore(slide.score, this.model.target));
    showTiles(pathOf(slide.id), this.model.target, (row) => this._showTile(row));
  }

  _offerOverlays() {
    const { overlays } = this.slide;
    find("overlays").hidden = !overlays.length;
    const choices = [{ name: "", title: "none" }, ...overlays];
    find("overlay").replaceChildren(...choices.map(({ name, title }) => make("option", { value: name }, title)));
    find("overlay").value = overlays[0]?.name ?? "";
    this._showOverlay(find("overlay").value);
  }

  _showOverlay(name) {
    const overlay = this.slide.overlays.find((one) => one.name === name);
    const url = overlay && `${pathOf(this.slide.id)}/overlays/${encodeURIComponent(name)}.png`;
    this.viewer.showOverlay(overlay, url);
    showLegend(overlay);
  }

  _showTile({ x, y, side }) {
    const middle = [Math.round(x + side / 2), Math.round(y + side / 2)];
    find("stage").scrollIntoView({ block: "nearest" });
    this.viewer.moveTo(...middle);
    this.queryPlace(...middle);
  }

  async queryPlace(x, y) {
    const path = pathOf(this.slide.id);
    const { field } = this.slide;
    this.viewer.markSquare(x - field / 2, y - field / 2, field);
    const title = `place ${formatWhole(x)}, ${formatWhole(y)}`;
    const asked = { title, image: addParameters(`${path}/region.jpg`, { x, y }) };
    const answer = await showQuery(asked, this.model.target, () =>
      post(addParameters(`${path}/query`, { x, y, k: 5 })),
    );
    if (answer) this.viewer.markSquare(answer.x, answer.y, answer.side);
  }
}

// Why there are two answers, and that they may differ.
function explainRules({ label, area }, target) {
  const rules =
    "The headline is the mean of all tiles; by area, the answer is the highest " +
    `${target.label_word} that more than ${target.area_percent} % of the tiles reach`;
  if (label === null || label === area.label) return `${rules}. The two agree here.`;
  return `${rules}. The two differ here: look on the map where the tiles of ${area.label} lie, and whether they are tissue.`;
}

function describeScore(score, target) {
  const { answer } = score;
  const parts = [];
  const facts = [];
  if (answer.value) {
    const { value, low, high } = answer.value;
    const range = low === null ? "" : ` (${formatNumber(low)} to ${formatNumber(high)})`;
    parts.push(make("p", { class: "label" }, formatLabel(value, target.unit) + range));
  } else if (answer.label !== null) {
    parts.push(make("p", { class: "label" }, `${target.label_word} ${answer.label}`));
  }
  if (answer.label_set) {
    const [join, name] = target.kind === "number" ? [" to ", "interval"] : [", ", "label set, not excluded"];
    facts.push([name, answer.label_set.map((one) => formatLabel(one, target.unit)).join(join)]);
  }
  facts.push(
    ["tissue", `${formatNumber(score.tissue.area_mm2)} mm²`],
    ["of it perhaps pen", formatPercent(score.tissue.pen)],
    ["of it blurred", formatPercent(score.tissue.blurred)],
    ["tiles", `${formatWhole(score.tiles)}, of which ${score.failed} failed and ${score.blank} are blank`],
  );
  if (Object.keys(answer.probabilities).length) parts.push(makeShares(answer.probabilities, "Mean of the tiles"));
  if (answer.area) {
    parts.push(make("p", { class: "rules" }, explainRules(answer, target)));
    parts.push(make("p", {}, `By area: ${target.label_word} ${answer.area.label}`));
    parts.push(makeShares(answer.area.shares, "Tiles of this class or higher"));
  }
  parts.push(
    make(
      "dl",
      {},
      facts.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]),
    ),
    listNotes(score.notes),
  );
  return parts.filter((part) => part);
}
