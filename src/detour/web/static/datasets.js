/* The list of datasets: make, rename, remove, bring back. */
import { api, during, element, toast } from "./app.js";
import { ask } from "./ask.js";
import { moment } from "./words.js";

const at = (id) => document.getElementById(id);

async function show() {
  try {
    const found = await api("GET", "/api/datasets");
    at("trouble").hidden = true;
    at("nothing").hidden = found.datasets.length > 0;
    at("list").replaceChildren(...found.datasets.map(row));
    at("trash").hidden = found.trash.length === 0;
    at("trash-count").textContent = found.trash.length;
    at("trash-list").replaceChildren(...found.trash.map(trashed));
  } catch (error) {
    at("trouble").textContent = error.message;
    at("trouble").hidden = false;
  } finally {
    at("loading").hidden = true;
  }
}

function row(dataset) {
  const missing = dataset.pictures - dataset.captions;
  const words = `${dataset.pictures} ${dataset.pictures === 1 ? "picture" : "pictures"}`
    + (missing ? `, ${missing} without a caption` : "");
  const remove = element("button", { type: "button", class: "small", "aria-label": `Remove ${dataset.name}` }, "Remove");
  remove.addEventListener("click", () => during(remove, async () => {
    const gone = await api("DELETE", `/api/datasets/${encodeURIComponent(dataset.name)}`);
    toast(`“${gone.name}” is removed. It can be brought back below.`);
    await show();
  }));
  return element("li", { class: "card row" },
    element("a", { class: "grow wrap", href: `/datasets/${encodeURIComponent(dataset.name)}` }, dataset.name),
    element("span", { class: missing ? "" : "quiet" }, words), remove);
}

function trashed(one) {
  const back = element("button", { type: "button", class: "small", "aria-label": `Bring back ${one.name}` }, "Bring back");
  back.addEventListener("click", () => during(back, async () => {
    await api("POST", `/api/trash/${one.id}/restore`);
    await show();
  }));
  const destroy = element("button", { type: "button", class: "small danger", "aria-label": `Delete ${one.name} for good` }, "Delete for good");
  destroy.addEventListener("click", () => during(destroy, async () => {
    const sure = await ask({
      title: `Delete ${one.name} for good?`, action: "Delete for good", danger: true,
      text: "Its pictures and captions are deleted from the disk. This cannot be undone.",
    });
    if (sure) await api("DELETE", `/api/trash/${one.id}`);
    await show();
  }));
  return element("li", { class: "row" }, element("span", { class: "grow wrap" }, one.name),
    element("span", { class: "quiet" }, moment(one.at)), back, destroy);
}

at("create").addEventListener("submit", (event) => {
  event.preventDefault();
  const button = at("create").querySelector("button");
  during(button, async () => {
    const made = await api("POST", "/api/datasets", { name: at("new-name").value });
    location.assign(`/datasets/${encodeURIComponent(made.name)}`);
  });
});

show();
