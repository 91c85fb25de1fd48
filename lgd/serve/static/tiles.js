// The tiles of a slide as a table: the heatmap for those who do not see it.
import { addParameters, attempt, get } from "./api.js";
import { find, formatNumber, formatPercent, formatWhole, make, makePages } from "./dom.js";

const LIMIT = 20;
// What a click on a column's title asks for next.
const NEXT = { number: "-grade", "-grade": "grade", grade: "number" };
const ORDER = { number: null, grade: "ascending", "-grade": "descending" };

let newest = 0;

// `show(row)` moves the view to a tile and queries it.
export async function showTiles(path, target, show, offset = 0, sort = "number") {
  const number = ++newest;
  const page = await attempt(() => get(addParameters(`${path}/rows`, { offset, limit: LIMIT, sort })));
  if (!page || number !== newest) return;
  const again = (to, by) => showTiles(path, target, show, to, by);
  const sorter = make("button", { type: "button", onclick: () => again(0, NEXT[sort]) }, "Grade");
  const titles = ["Tile", "View", "Place (px)", target.label_word, sorter, ...target.classes, "Tissue", "Notes"];
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
      page.rows.map((row) => makeRow(row, target, show)),
    ),
  );
  const focused = find("tiles").contains(document.activeElement) && document.activeElement.textContent;
  find("tiles").replaceChildren(
    make("div", { class: "wide", role: "region", "aria-label": "Table of tiles", tabindex: "0" }, table),
    makePages(offset, LIMIT, page.total, (to) => again(to, sort)),
  );
  if (focused) [...find("tiles").querySelectorAll("button")].find((one) => one.textContent === focused)?.focus();
}

function makeRow(row, target, show) {
  const label = row.label === null ? "no answer" : typeof row.label === "number" ? formatNumber(row.label) : row.label;
  const cells = [
    `${formatWhole(row.x)}, ${formatWhole(row.y)}`,
    label,
    formatNumber(row.grade),
    ...target.classes.map((name) => formatPercent(row.probabilities?.[name] ?? null)),
    formatPercent(row.tissue),
    [row.notes, row.error].flat().filter(Boolean).join("; "),
  ];
  const name = `Show tile ${row.number}`;
  return make(
    "tr",
    {},
    make("th", { scope: "row" }, formatWhole(row.number)),
    make("td", {}, make("button", { type: "button", "aria-label": name, onclick: () => show(row) }, "Show")),
    cells.map((text) => make("td", {}, text)),
  );
}
