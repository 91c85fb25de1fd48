// The store's patches, a page at a time. A click or Enter on one queries with its H&E.
import { addParameters, attempt, get, makeImage, post } from "./api.js";
import { showQuery } from "./answer.js";
import { find, formatLabel, make, makePages } from "./dom.js";

const LIMIT = 60;

export class Gallery {
  constructor(model) {
    this.target = model.target;
    this.opened = false;
    this.newest = 0;
    const { splits, labels } = model.store;
    fillChoice("split", splits);
    fillChoice("label", Object.keys(labels));
    find("filters").addEventListener("change", () => this.showPage(0));
    find("filters").addEventListener("submit", (event) => event.preventDefault());
  }

  async open() {
    if (!this.opened) await this.showPage(0);
    this.opened = true;
  }

  async showPage(offset) {
    const number = ++this.newest;
    const choice = { split: find("split").value, label: find("label").value };
    const page = await attempt(() => get(addParameters("patches", { offset, limit: LIMIT, ...choice })));
    if (!page || number !== this.newest) return;
    find("patches").replaceChildren(...page.patches.map((patch) => make("li", {}, this._makeTile(patch))));
    find("gallery-pages").replaceChildren(makePages(offset, LIMIT, page.total, (to) => this.showPage(to)));
  }

  _makeTile(patch) {
    const label = formatLabel(patch[this.target.label_word], this.target.unit);
    const alt = `H&E of patch ${patch.key}`;
    return make("button", { onclick: () => this._query(patch) }, makeImage(patch.he, alt), make("span", {}, label));
  }

  _query(patch) {
    const asked = { title: `patch ${patch.key}`, image: patch.he };
    return showQuery(asked, this.target, () => post(`patches/${encodeURIComponent(patch.id)}/query?k=5`));
  }
}

function fillChoice(id, values) {
  find(id).replaceChildren(
    make("option", { value: "" }, "all"),
    ...values.map((value) => make("option", { value }, value)),
  );
  const hidden = !values.length;
  find(id).hidden = hidden;
  document.querySelector(`label[for=${id}]`).hidden = hidden;
}
