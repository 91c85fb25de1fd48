// The legend of an overlay: colours with their labels, or a scale with its values.
import { find, make } from "./dom.js";

export function showLegend(overlay) {
  if (!overlay) {
    find("legend").replaceChildren();
    return;
  }
  const title = overlay.unit ? `${overlay.title} (${overlay.unit})` : overlay.title;
  const { legend } = overlay;
  const missing = legend.no_answer ? [{ label: "no answer", colour: legend.no_answer }] : [];
  const parts =
    legend.kind === "classes"
      ? [makeClasses([...legend.entries, ...missing])]
      : [makeScale(legend), makeClasses(missing)];
  find("legend").replaceChildren(make("span", { class: "title" }, title), ...parts);
}

function makeClasses(entries) {
  return make(
    "ul",
    {},
    entries.map(({ label, colour }) => {
      const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.backgroundColor = colour;
      return make("li", {}, swatch, label);
    }),
  );
}

function makeScale({ stops, ticks }) {
  const first = stops[0].value;
  const width = stops.at(-1).value - first;
  const place = (value) => `${(100 * (value - first)) / width}%`;
  const bar = make("div", { class: "bar", "aria-hidden": "true" });
  bar.style.background = `linear-gradient(to right, ${stops.map(({ value, colour }) => `${colour} ${place(value)}`).join(", ")})`;
  const marks = ticks.map(({ value, label }) => {
    const mark = make("span", {}, label);
    mark.style.left = place(value);
    return mark;
  });
  return make("div", { class: "scale" }, bar, make("div", { class: "ticks" }, marks));
}
