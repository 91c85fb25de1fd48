// A patch file of the user's own, scored, and compared with the known IHC where there is a store.
import { addParameters, post } from "./api.js";
import { showQuery } from "./answer.js";
import { find, formatNumber } from "./dom.js";

export function offerUpload(model) {
  if (model.mpp) find("own-scale").textContent = `The network has ${formatNumber(model.mpp, 3)} µm a pixel.`;
  find("upload").addEventListener("submit", (event) => {
    event.preventDefault();
    const file = find("file").files[0];
    const mpp = find("mpp").value;
    showQuery({ title: file.name, image: file }, model.target, async () => {
      const predicted = await post(addParameters("predict", { mpp }), file);
      const found = model.store ? await post(addParameters("query", { k: 5, mpp }), file) : {};
      return { ...found, ...predicted };
    });
  });
}
