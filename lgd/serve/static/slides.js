// The list of slides with state and progress. While one is scored, the list is fetched again.
import { get, showError } from "./api.js";
import { find, formatPercent, make } from "./dom.js";

const PAUSE = 1500; // ms
const LONG_PAUSE = 6000;
const ACTIVE = ["queued", "scoring"];

let timer = null;

export const pathOf = (id) => `slides/${encodeURIComponent(id)}`;

export const describeState = ({ state, progress }) =>
  state === "scoring" ? `scoring, ${formatPercent(progress)}` : state;

// Draw the list. `change(slides)` is called whenever it was fetched, `choose(id)` when a slide is chosen. What another
// request left in the alert stays there.
export async function watchSlides(choose, change) {
  clearTimeout(timer);
  let pause = null;
  try {
    const slides = await get("slides");
    drawList(slides, choose);
    if (slides.some(({ state }) => ACTIVE.includes(state))) pause = PAUSE;
    await change(slides);
  } catch (error) {
    showError(error);
    pause = LONG_PAUSE;
  }
  if (pause) timer = setTimeout(() => watchSlides(choose, change), pause);
}

export function markCurrent(id) {
  for (const button of find("slides").querySelectorAll("button")) {
    if (button.dataset.id === id) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

// The buttons are kept where the slides are the same, so that the focus stays.
function drawList(slides, choose) {
  const list = find("slides");
  const ids = slides.map(({ id }) => id).join("\n");
  if (list.dataset.ids !== ids) {
    list.dataset.ids = ids;
    list.replaceChildren(
      ...slides.map((slide) =>
        make(
          "li",
          {},
          make(
            "button",
            { "data-id": slide.id, onclick: () => choose(slide.id) },
            make("span", { class: "name" }, slide.name),
            make("span", { class: "state" }),
          ),
          make("p", { class: "problem" }),
          make("progress", { max: 1, "aria-label": `Progress of ${slide.name}`, hidden: true }),
        ),
      ),
    );
    if (!slides.length) list.append(make("li", {}, "The folder holds no slide."));
  }
  slides.forEach((slide, number) => {
    const row = list.children[number];
    row.querySelector(".state").textContent = describeState(slide);
    const problem = row.querySelector(".problem");
    problem.textContent = slide.problem ?? "";
    problem.hidden = !slide.problem;
    const bar = row.querySelector("progress");
    bar.value = slide.progress;
    bar.hidden = !ACTIVE.includes(slide.state);
  });
}
