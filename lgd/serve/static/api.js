// Requests to the service: by fetch, with the token where there is one, and with errors in words.
import { find, make } from "./dom.js";

const KEPT = "lgd-token";

// The token comes in the fragment (#token=...), which no server sees, and leaves the address bar at once.
export function readToken() {
  const fragment = new URLSearchParams(location.hash.slice(1));
  if (fragment.has("token")) {
    sessionStorage.setItem(KEPT, fragment.get("token"));
    fragment.delete("token");
    history.replaceState(null, "", `${location.pathname}${location.search}#${fragment}`);
  }
  find("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEPT, find("token").value.trim());
    location.reload();
  });
}

export function makeHeaders() {
  const token = sessionStorage.getItem(KEPT);
  return token ? { Authorization: `Bearer ${token}` } : {};
}

// A response of status 2xx; any other throws an Error with the server's sentence.
async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...makeHeaders(), ...options.headers } });
  } catch {
    throw new Error("The service does not answer: check that it still runs, and load this page again.");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    find("token-form").hidden = false;
    const given = sessionStorage.getItem(KEPT);
    throw new Error(given ? "This token is wrong." : "Give the token of this service, which its owner has.");
  }
  const body = await response.json().catch(() => ({}));
  throw new Error(typeof body.detail === "string" ? body.detail : `The service answers ${response.status} to ${path}.`);
}

export const get = async (path) => (await request(path)).json();

export async function post(path, body = null) {
  const headers = body ? { "Content-Type": body.type || "application/octet-stream" } : {};
  return (await request(path, { method: "POST", body, headers })).json();
}

// Query parameters of which those that are empty are left out.
export function addParameters(path, parameters) {
  const given = Object.entries(parameters).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return given.length ? `${path}?${new URLSearchParams(given)}` : path;
}

// An image of the service: fetched with the token, and shown from memory, which is freed when it is drawn. `source` is a
// url or a file; null where the service has no image.
export function makeImage(source, alt) {
  if (!source) return make("span", { class: "missing" }, `no image: ${alt}`);
  const image = make("img", { alt });
  const show = (blob) => {
    image.src = URL.createObjectURL(blob);
    image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
  };
  if (source instanceof Blob) show(source);
  else
    request(source)
      .then((response) => response.blob())
      .then(show)
      .catch(showError);
  return image;
}

export async function download(path, name) {
  const url = URL.createObjectURL(await (await request(path)).blob());
  make("a", { href: url, download: name }).click();
  // The browser reads it after this task.
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

export function showError(error) {
  find("alert").textContent = error.message;
}

// Run what may fail. The alert of what failed before goes away.
export async function attempt(action) {
  find("alert").textContent = "";
  try {
    return await action();
  } catch (error) {
    showError(error);
    return undefined;
  }
}
