// Small helpers for elements and for numbers in words. Text from the server goes in as text, never as HTML.

export const find = (id) => document.getElementById(id);

// An element. Attributes that are null or false are left out, functions become listeners (onclick), strings become text.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false && value !== undefined)
      element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

export function listNotes(notes) {
  return notes.length
    ? make(
        "ul",
        { class: "notes" },
        notes.map((note) => make("li", {}, note)),
      )
    : null;
}

const number = (digits) => new Intl.NumberFormat("en", { maximumFractionDigits: digits });
const whole = number(0),
  short = number(2),
  long = number(3);

export const formatWhole = (value) => whole.format(value);
export const formatNumber = (value, digits = 2) => (value === null ? "–" : (digits === 2 ? short : long).format(value));
export const formatPercent = (share) => (share === null ? "–" : `${whole.format(100 * share)} %`);

// A class as it is, a value with its unit.
export function formatLabel(label, unit) {
  if (label === null || label === undefined) return "unknown";
  return typeof label === "number" ? `${short.format(label)}${unit ? ` ${unit}` : ""}` : label;
}

export function formatLength(um) {
  return um >= 1000 ? `${short.format(um / 1000)} mm` : `${(um < 10 ? short : whole).format(um)} µm`;
}

// A row of buttons that leaf through `total` rows, `limit` at a time.
export function makePages(offset, limit, total, open) {
  const last = Math.min(offset + limit, total);
  const step = (text, to, able) => make("button", { type: "button", disabled: !able, onclick: () => open(to) }, text);
  return make(
    "p",
    { class: "buttons" },
    step("Previous", Math.max(0, offset - limit), offset > 0),
    make(
      "span",
      { role: "status" },
      total ? `${formatWhole(offset + 1)} to ${formatWhole(last)} of ${formatWhole(total)}` : "none",
    ),
    step("Next", offset + limit, last < total),
  );
}
