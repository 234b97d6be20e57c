/* A dataset's page: its views, counts and settings. The views' own files do the rest. */
import { api, during, toast } from "./app.js";
import { showBuckets } from "./dataset_buckets.js";
import { showBulk } from "./dataset_bulk.js";
import { showHealth } from "./dataset_health.js";
import { showHistory } from "./dataset_history.js";
import { saveAll, showPictures } from "./dataset_pictures.js";
import { NAME, address, at, count, onChanged } from "./dataset_tools.js";
import "./dataset_upload.js";

const VIEWS = {
  pictures: showPictures, bulk: showBulk, health: showHealth, buckets: showBuckets, history: showHistory, settings: () => {},
};
const tabs = [...document.querySelectorAll("[role=tab]")];
let shown = null;

/** Show a view; what is being typed elsewhere is saved first. */
async function select(tab, focus = false) {
  await saveAll();
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    at(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (focus) tab.focus();
  shown = tab.getAttribute("aria-controls");
  history.replaceState(null, "", `#${shown}`);
  VIEWS[shown]();
}

for (const [place, tab] of tabs.entries()) {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) select(tabs[(place + step + tabs.length) % tabs.length], true);
    if (event.key === "Home") select(tabs[0], true);
    if (event.key === "End") select(tabs.at(-1), true);
  });
}

async function showCounts() {
  const found = await api("GET", address(""));
  const parts = [count(found.pictures, "picture"), `${found.captions} with captions`];
  if (found.lone_captions) parts.push(`${count(found.lone_captions, "caption")} without a picture`);
  if (found.others) parts.push(`${count(found.others, "other file")}`);
  at("counts").textContent = `${parts.join(" · ")} · in a job: folder_path: ${found.folder_path}`;
}

at("settings-form").addEventListener("submit", (event) => {
  event.preventDefault();
  during(event.submitter, async () => {
    await api("PATCH", address(""), { trigger_word: at("trigger").value, caption_ext: at("ending").value });
    toast("Saved.");
    await showCounts();
  });
});

at("rename-form").addEventListener("submit", (event) => {
  event.preventDefault();
  during(event.submitter, async () => {
    const named = await api("POST", address("/rename"), { name: at("rename").value });
    location.assign(`/datasets/${encodeURIComponent(named.name)}#settings`);
  });
});

at("remove-dataset").addEventListener("click", () => during(at("remove-dataset"), async () => {
  await api("DELETE", address(""));
  location.assign("/datasets");
}));

onChanged(() => {
  showCounts().catch((error) => toast(error.message, "error"));
  VIEWS[shown]?.();
});
document.title = `${NAME} · Detour`;
showCounts().catch((error) => { at("counts").textContent = error.message; });
const asked = tabs.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash);
select(asked ?? tabs[0]);
