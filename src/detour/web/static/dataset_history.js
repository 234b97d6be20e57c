/* What was changed, and taking it back. */
import { api, during, element, toast } from "./app.js";
import { ask } from "./ask.js";
import { address, at, changed, count, undoChange } from "./dataset_tools.js";
import { bytes, moment } from "./words.js";

/** Read the history and show it. */
export async function showHistory() {
  try {
    const found = await api("GET", address("/history"));
    at("changes").replaceChildren(...found.changes.map(line));
    at("no-changes").hidden = found.changes.length > 0;
    at("forget").hidden = found.changes.length === 0;
    at("kept").textContent = found.changes.length ? `${bytes(found.kept_bytes)} on the disk, removed pictures included` : "";
  } catch (error) {
    toast(error.message, "error");
  }
}

function line(change) {
  const undo = element("button", { type: "button", class: "small", "aria-label": `Undo: ${change.title}` }, "Undo");
  undo.addEventListener("click", () => during(undo, () => undoChange(change.id)));
  return element("li", { class: `row ${change.undone ? "undone" : ""}`, "data-change": change.id },
    element("span", { class: "grow wrap" }, change.title),
    element("span", { class: "quiet" }, `${count(change.count, "file")} · ${moment(change.at)}`), undo);
}

at("forget").addEventListener("click", () => during(at("forget"), async () => {
  const sure = await ask({
    title: "Empty the history?", action: "Empty it", danger: true,
    text: "Removed pictures and earlier captions are deleted from the disk. What is in the dataset stays.",
  });
  if (!sure) return;
  await api("DELETE", address("/history"));
  changed();
}));
