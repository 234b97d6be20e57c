/* A job's own page: its state, what can be done with it, and its tabs. Events say when there is something to ask for. */
import { api, during, element } from "./app.js";
import { act } from "./ask.js";
import { Overview } from "./job_curves.js";
import { Files, JobFile, Log, Timeline } from "./job_tabs.js";
import { Samples } from "./job_samples.js";
import { progressText, showProgress, stateText } from "./words.js";

const at = (id) => document.getElementById(id);
const job = Number(at("job").dataset.job);
const root = `/api/jobs/${job}`;
const ENDED = ["finished", "stopped", "failed"];
const AT_WORK = ["starting", "running", "stopping"];
const CALM = 1000; // milliseconds between two questions of a kind, however many events come
const IDLE = 10_000; // between two looks at a job that is not at work: somebody may start it elsewhere

let detail = null;

/** Runs at most once in `CALM`, and once more after the last call; never twice at a time. */
function calmly(action) {
  let [running, again] = [false, false];
  return async function run() {
    if (running) {
      again = true;
      return;
    }
    running = true;
    do {
      again = false;
      try {
        await action();
        at("trouble").hidden = true;
      } catch (error) {
        at("trouble").hidden = false;
        at("trouble").textContent = error.message;
      }
      await new Promise((resolve) => setTimeout(resolve, CALM));
    } while (again);
    running = false;
  };
}

const tabs = {
  overview: new Overview(root),
  samples: new Samples(job),
  log: new Log(root, () => detail),
  files: new Files(root),
  "job-file": new JobFile(root),
  timeline: new Timeline(root),
};
const refresh = Object.fromEntries(Object.entries(tabs).map(([name, tab]) => [name, calmly(() => tab.refresh())]));
const header = calmly(async () => showJob(await api("GET", root)));

// --- the head of the page ---------------------------------------------------------------------------------------------

function showJob(found) {
  detail = found;
  at("name").textContent = found.name;
  at("state").textContent = stateText(found);
  at("state").className = `state ${found.state}`;
  at("device").textContent = found.device;
  at("figures").textContent = progressText(found.progress);
  at("says").textContent = found.says;
  at("says").className = found.state === "failed" ? "says error" : "says";
  const atWork = AT_WORK.includes(found.state);
  showProgress(at("bar"), found.progress, atWork);
  const ended = ENDED.includes(found.state);
  at("device").hidden = !ended; // else what it says tells
  const possible = {
    start: ended, extend: ended && found.attempts > 0, delete: !atWork, clone: true, stop: !ended,
    save: found.state === "running", sample: found.state === "running", kill: ["running", "stopping"].includes(found.state),
  };
  for (const button of document.querySelectorAll("[data-act]")) button.hidden = !possible[button.dataset.act];
  at("edit").hidden = atWork;
  const button = (name) => document.querySelector(`[data-act=${name}]`);
  button("start").textContent = found.attempts === 0 ? "Start" : found.state === "finished" ? "Run again" : "Start again";
  button("start").classList.toggle("primary", found.state !== "finished");
  button("extend").classList.toggle("primary", found.state === "finished"); // there is nothing left to do else
  button("stop").textContent = found.state === "queued" ? "Take out of the queue" : found.stops > 0 ? "Stop at once" : "Stop (saves)";
  at("commands").replaceChildren(...Object.entries(COMMANDS).flatMap(([name, label]) => [
    element("dt", {}, label), element("dd", {}, element("code", {}, found.commands[name]))]));
}

const COMMANDS = {
  start: "Start", stop: "Stop (again: at once)", kill: "Kill", save: "Save now", sample: "Sample now",
  extend: "More steps, without the queue", list: "See the queue",
};

for (const button of document.querySelectorAll("[data-act]")) {
  button.addEventListener("click", () => during(button, async () => {
    const answer = await act(detail, button.dataset.act);
    if (!answer) return;
    if (button.dataset.act === "delete") location.href = "/jobs";
    else if (button.dataset.act === "clone") location.href = `/jobs/new?edit=${answer.job.id}`;
    else {
      showJob(await api("GET", root));
      listen();
    }
  }));
}

// --- tabs, by the address's hash: #samples, #samples/250 --------------------------------------------------------------

const links = [...document.querySelectorAll("[role=tab]")];
let current = "";

function showTab() {
  const [name, ...rest] = location.hash.slice(1).split("/");
  const chosen = name in tabs ? name : "overview";
  const changed = chosen !== current;
  current = chosen;
  for (const link of links) {
    const selected = link.hash === `#${chosen}`;
    link.setAttribute("aria-selected", String(selected));
    link.tabIndex = selected ? 0 : -1;
    at(link.hash.slice(1)).hidden = !selected;
  }
  tabs[chosen].shown?.(rest);
  if (changed) refresh[chosen]();
}

links.forEach((link, place) => link.addEventListener("keydown", (event) => {
  const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: links.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const next = links[(to + links.length) % links.length];
  next.click();
  next.focus();
}));
links.forEach((link) => link.addEventListener("click", (event) => {
  event.preventDefault(); // the browser would scroll to the panel
  history.replaceState(null, "", link.hash);
  showTab();
}));
addEventListener("hashchange", showTab);

// --- events -----------------------------------------------------------------------------------------------------------

const WANTS = { // what an event makes out of date
  step: ["overview"], validation: ["overview"], drift: ["overview"], sample: ["samples"], save: ["files", "timeline"],
  gate: ["samples", "timeline"], plateau: ["timeline"],
  start: ["overview", "timeline"], stage: ["timeline"], warning: ["timeline"], stop: ["timeline"],
  end: ["timeline", "files"],
};
let stream = null;
let place = "end"; // behind the last event; a page in the background lets go of its connection

function listen() {
  if (stream || document.hidden) return;
  stream = new EventSource(`${root}/events?since=${encodeURIComponent(place)}`);
  stream.addEventListener("open", () => at("trouble").hidden = true);
  stream.addEventListener("message", (event) => {
    place = event.lastEventId || place;
    const wanted = WANTS[JSON.parse(event.data).type] ?? [];
    if (wanted.includes(current)) refresh[current]();
    header();
  });
  stream.addEventListener("state", () => everything());
  stream.addEventListener("reset", () => everything());
  for (const last of ["done", "gone", "trouble"]) {
    stream.addEventListener(last, (event) => {
      hush();
      everything();
      if (last === "trouble") {
        at("trouble").hidden = false;
        at("trouble").textContent = JSON.parse(event.data).error;
      }
    });
  }
  stream.addEventListener("error", () => {
    at("trouble").hidden = false;
    at("trouble").textContent = "The connection to the server is lost. Jobs go on; this page goes on when it is back.";
    if (stream?.readyState === EventSource.CLOSED) hush(); // refused: asked again at the next look
  });
}

function hush() {
  stream?.close();
  stream = null;
}

function everything() {
  header();
  refresh[current]();
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) return hush();
  everything();
  return listen();
});
setInterval(async () => {
  if (document.hidden || stream) return;
  await header();
  if (detail && !ENDED.includes(detail.state)) listen();
}, IDLE);

showTab();
header();
listen();
