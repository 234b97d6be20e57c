/* What the parts of a dataset's page share: its addresses, pictures, and offers to undo. */
import { api, during, element, toast } from "./app.js";

export const NAME = document.getElementById("dataset").dataset.name;
const ROOT = `/api/datasets/${encodeURIComponent(NAME)}`;

/** The address of something of this dataset; `key` is a file's name, with folders. */
export function address(what, key = null, query = {}) {
  const path = key === null ? `${ROOT}${what}` : `${ROOT}/${what}/${key.split("/").map(encodeURIComponent).join("/")}`;
  const given = Object.entries(query).filter(([, value]) => value !== undefined && value !== "");
  return given.length ? `${path}?${new URLSearchParams(given)}` : path;
}

/** By its id. */
export const at = (id) => document.getElementById(id);

/** Says that something was done, with a button that takes it back. Stays for 12 seconds. */
export function offerUndo(text, change) {
  const undo = element("button", { type: "button", class: "small" }, "Undo");
  const shown = element("div", { class: "toast" }, element("p", {}, text), undo);
  undo.addEventListener("click", () => during(undo, async () => {
    await undoChange(change);
    shown.remove();
  }));
  document.getElementById("toasts").append(shown);
  setTimeout(() => shown.remove(), 12000);
}

/** Take a change back, and show the page as it is then. */
export async function undoChange(change) {
  await api("POST", address(`/history/${change}/undo`));
  toast("Undone.");
  changed();
}

/** Tell all parts of the page that files have changed. */
export function changed() {
  document.dispatchEvent(new CustomEvent("dataset-changed"));
}

/** Have a part of the page told. */
export function onChanged(action) {
  document.addEventListener("dataset-changed", action);
}

/** A small picture that opens the large one. A picture that cannot be shown says so. */
export function thumbnail(key, source, open) {
  const button = element("button", { type: "button", class: "thumb", "aria-label": `Enlarge ${key}` });
  const img = element("img", { src: source, alt: "", loading: "lazy", decoding: "async" });
  img.addEventListener("error", () => img.replaceWith(element("span", { class: "quiet" }, "cannot be shown")));
  button.append(img);
  button.addEventListener("click", open);
  return button;
}

/** `1 picture`, `3 pictures`. */
export function count(number, thing) {
  return `${number} ${thing}${number === 1 ? "" : "s"}`;
}
