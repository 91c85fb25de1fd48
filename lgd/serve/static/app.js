// The atlas: header, list of slides, and what the fragment of the address names.
//   #slide=ID&x=X&y=Y&zoom=Z   a slide, whole or at a place (level-0 pixels; zoom is screen pixels a slide's pixel)
//   #view=gallery              the gallery
import { attempt, get, readToken, showError } from "./api.js";
import { clearAnswer } from "./answer.js";
import { find, make } from "./dom.js";
import { Gallery } from "./gallery.js";
import { SlidePage } from "./slide.js";
import { markCurrent, watchSlides } from "./slides.js";
import { offerUpload } from "./upload.js";

const VIEWS = ["slide-view", "gallery-view", "welcome"];

let model = null;
let page = null;
let gallery = null;
let shown = "";

function describeModel() {
  const { target, method, name, virtual, notes } = model;
  find("model").textContent = [method, target.name, name].filter(Boolean).join(" · ");
  const stated =
    virtual && !notes.some((note) => note.includes("virtual")) ? ["trained on virtual tissue only", ...notes] : notes;
  find("model-notes").replaceChildren(...stated.map((note) => make("li", {}, note)));
}

function readFragment() {
  const fragment = new URLSearchParams(location.hash.slice(1));
  const [x, y, zoom] = ["x", "y", "zoom"].map((name) => Number.parseFloat(fragment.get(name)));
  const view = Number.isFinite(x) && Number.isFinite(y) ? { x, y, zoom: zoom > 0 ? zoom : null } : null;
  return { slide: fragment.get("slide"), view, gallery: fragment.get("view") === "gallery" };
}

function showView(id, name) {
  for (const one of VIEWS) find(one).hidden = one !== id;
  // What was said of another slide or patch would mislead.
  if (shown && shown !== name) clearAnswer();
  shown = name;
}

async function follow() {
  const { slide: named, view, gallery: wanted } = readFragment();
  const slide = model.slides ? named : null;
  markCurrent(slide);
  if (gallery && (wanted || (!slide && !model.slides))) {
    showView("gallery-view", "gallery");
    await gallery.open();
  } else if (slide) {
    showView("slide-view", `slide ${slide}`);
    page ??= new SlidePage(model, { settle: keepView, refresh: refreshSlides });
    const opened = await attempt(() => page.open(slide, view).then(() => true));
    if (!opened && readFragment().slide === slide) showView("welcome", "welcome");
  } else {
    showView("welcome", "welcome");
  }
  if (named && !slide)
    showError(new Error("This address names a slide, and the service was started without --slides."));
}

function go(fragment) {
  if (location.hash.slice(1) === fragment) follow();
  else location.hash = fragment;
}

const openSlide = (id) => go(`slide=${encodeURIComponent(id)}`);

const refreshSlides = () => watchSlides(openSlide, (slides) => page?.follow(slides));

// The address follows the view without filling the history.
function keepView(id, { x, y, zoom }) {
  if (readFragment().slide !== id) return;
  const place = { slide: id, x: Math.round(x), y: Math.round(y), zoom: zoom.toPrecision(4) };
  history.replaceState(null, "", `#${new URLSearchParams(place)}`);
}

async function start() {
  readToken();
  find("skip").addEventListener("click", (event) => {
    // The fragment is taken.
    event.preventDefault();
    find("main").focus();
  });
  model = await attempt(() => get("model"));
  if (!model) {
    find("model").textContent = "";
    return;
  }
  describeModel();
  find("columns").hidden = false;
  find("no-slides").hidden = model.slides;
  find("no-store").hidden = Boolean(model.store);
  find("open-gallery").hidden = !model.store;
  find("open-gallery").addEventListener("click", () => go("view=gallery"));
  if (model.store) gallery = new Gallery(model);
  offerUpload(model);
  if (model.slides) await refreshSlides();
  // Of a link with a token, in the same tab, all is loaded again.
  window.addEventListener("hashchange", () => (location.hash.includes("token=") ? location.reload() : follow()));
  await follow();
}

start();
