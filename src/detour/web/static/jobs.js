/* The list of jobs: what runs, what waits in which order, what has ended. Asked for again every two seconds. */
import { api, ApiError, during, element, toast } from "./app.js";
import { act } from "./ask.js";
import { progressText, showProgress, stateText } from "./words.js";

const at = (id) => document.getElementById(id);
const EVERY = 2000; // milliseconds
const PAGE = 50;
const AT_WORK = ["starting", "running", "stopping"];
const ENDED = ["finished", "stopped", "failed"];
const GROUPS = { "": [], open: ["queued", ...AT_WORK], finished: ["finished"], stopped: ["stopped"], failed: ["failed"] };

let offset = 0;
let tag = ""; // of the answer that is shown
let shownFor = ""; // the question that it answers
let asking = null;
let placed = ""; // which jobs stand where
let dragged = null; // the job whose row is being dragged
const rows = new Map(); // job number -> its row, kept so that nothing loses the focus

function question() {
  const group = document.querySelector("[name=group]:checked").value;
  const words = new URLSearchParams(GROUPS[group].map((state) => ["state", state]));
  const search = at("search").value.trim();
  if (search) words.set("search", search);
  words.set("offset", offset);
  words.set("limit", PAGE);
  return `/api/jobs?${words}`;
}

/** Look at the queue. What has not changed is neither sent nor drawn again. */
async function look() {
  asking?.abort();
  const mine = new AbortController();
  asking = mine;
  const address = question();
  const headers = address === shownFor && tag ? { "If-None-Match": tag } : {};
  try {
    const answer = await fetch(address, { headers, signal: mine.signal, credentials: "same-origin" });
    at("trouble").hidden = true;
    if (answer.status === 304) return;
    const found = await answer.json();
    if (!answer.ok) throw new ApiError(answer.status, found.error, found);
    if (dragged !== null) return; // not under the user's hands
    tag = answer.headers.get("ETag") ?? "";
    shownFor = address;
    show(found);
  } catch (error) {
    if (error.name === "AbortError") return;
    at("trouble").hidden = false;
    at("trouble").textContent = error instanceof ApiError
      ? error.message
      : "The server does not answer. Jobs go on; start `detour ui` again to see them.";
  } finally {
    if (asking === mine) asking = null;
    at("loading").hidden = true;
  }
}

function show(found) {
  const all = Object.values(found.counts).reduce((sum, count) => sum + count, 0);
  at("filters").hidden = all === 0;
  at("nothing").hidden = all > 0;
  at("no-match").hidden = all === 0 || found.total > 0;
  at("no-worker").hidden = found.worker || found.counts.queued === 0;
  for (const place of document.querySelectorAll("[data-count]")) {
    const states = GROUPS[place.dataset.count];
    place.textContent = states.length ? states.reduce((sum, state) => sum + found.counts[state], 0) : all;
  }
  const groups = found.devices.map((device) => ({
    title: device.name,
    note: ` — ${device.at_work ? "one at work" : "nothing at work"}, ${device.queued} waiting`,
    jobs: found.jobs.filter((job) => job.device === device.name && !ENDED.includes(job.state)),
    queued: device.queued,
  }));
  groups.push({ title: "Ended, and drafts", note: "", jobs: found.jobs.filter((job) => ENDED.includes(job.state)), queued: 0 });
  placeRows(groups.filter((group) => group.jobs.length));
  showPages(found);
}

/** Draw the groups. Rows are moved only where their order has changed: what has the focus keeps it. */
function placeRows(groups) {
  const wanted = groups.flatMap((group) => group.jobs.map((job) => job.id));
  for (const number of rows.keys()) if (!wanted.includes(number)) rows.delete(number);
  const order = JSON.stringify(groups.map((group) => [group.title, group.jobs.map((job) => job.id)]));
  const nodes = groups.map((group) => group.jobs.map((job) => row(job, group.queued)));
  if (order === placed) {
    groups.forEach((group, index) => (at("lists").children[index].querySelector("h2 span").textContent = group.note));
    return;
  }
  placed = order;
  const focused = document.activeElement;
  at("lists").replaceChildren(...groups.map((group, index) => element("section", { class: "card", "aria-label": group.title },
    element("h2", {}, group.title, element("span", { class: "quiet" }, group.note)),
    element("ul", { class: "job-list" }, ...nodes[index]))));
  if (focused !== document.activeElement && focused?.isConnected) focused.focus();
}

function row(job, queued) {
  let kept = rows.get(job.id);
  if (!kept) {
    kept = newRow(job.id);
    rows.set(job.id, kept);
  }
  const { parts } = kept;
  kept.job = job;
  parts.name.textContent = job.name;
  parts.number.textContent = ` #${job.id}`;
  parts.state.className = `state ${job.state}`;
  parts.state.textContent = stateText(job);
  const atWork = AT_WORK.includes(job.state);
  parts.says.textContent = job.says;
  parts.says.className = job.state === "failed" ? "says error" : "says quiet";
  showProgress(parts.bar, job.progress, atWork);
  if (job.state === "finished") parts.bar.hidden = true; // a list of full bars says nothing
  parts.figures.textContent = progressText(job.progress);
  kept.node.draggable = job.state === "queued";
  parts.grip.hidden = job.state !== "queued";
  const possible = {
    start: ENDED.includes(job.state), stop: !ENDED.includes(job.state),
    up: job.state === "queued" && job.position > 1, down: job.state === "queued" && job.position < queued,
    edit: !atWork, clone: true, delete: !atWork,
  };
  parts.buttons.start.textContent = job.attempts === 0 ? "Start" : job.state === "finished" ? "Run again" : "Go on";
  parts.buttons.stop.textContent = job.state === "queued" ? "Take out" : job.stops > 0 ? "Stop at once" : "Stop (saves)";
  for (const [name, button] of Object.entries(parts.buttons)) {
    button.hidden = !possible[name];
    button.setAttribute("aria-label", `${button.textContent} job ${job.id}`);
  }
  return kept.node;
}

function newRow(number) {
  const address = `/jobs/${number}`;
  const link = element("a", { href: address });
  const parts = {
    grip: element("span", { class: "grip", "aria-hidden": "true", title: "Drag to another place" }, "⠿ "),
    name: link, number: element("span", { class: "quiet" }), state: element("span", { class: "state" }),
    says: element("p", {}), figures: element("span", { class: "quiet" }),
    bar: element("progress", { "aria-label": "Progress" }), buttons: {},
  };
  const button = (name, text, attributes, action) => {
    parts.buttons[name] = element("button", { type: "button", ...attributes, onclick: () => during(parts.buttons[name], action) }, text);
  };
  const doing = (what) => async () => {
    const answer = await act(rows.get(number).job, what);
    if (answer) await look();
  };
  button("start", "Start", {}, doing("start"));
  button("stop", "Stop", {}, doing("stop"));
  button("up", "Up", { title: "One place up in the queue" }, () => move(number, -1));
  button("down", "Down", { title: "One place down in the queue" }, () => move(number, 1));
  parts.buttons.edit = element("a", { class: "button", href: `/jobs/new?edit=${number}` }, "Edit");
  button("clone", "Clone", {}, async () => {
    const answer = await act(rows.get(number).job, "clone");
    location.href = `/jobs/new?edit=${answer.job.id}`;
  });
  button("delete", "Delete", { class: "danger" }, doing("delete"));
  const title = element("div", { class: "title" }, parts.grip, link, parts.number, " ", parts.state);
  const body = element("div", {}, title, parts.bar, parts.figures, parts.says);
  const node = element("li", { "data-job": number }, body, element("div", { class: "row actions" }, ...Object.values(parts.buttons)));
  makeDraggable(node, number);
  return { node, parts, job: null };
}

// --- another place in the queue ---------------------------------------------------------------------------------------

async function move(number, by) {
  await place(number, rows.get(number).job.position + by);
  const buttons = rows.get(number)?.parts.buttons;
  const next = by < 0 ? [buttons?.up, buttons?.down] : [buttons?.down, buttons?.up];
  next.find((button) => button && !button.hidden)?.focus();
}

async function place(number, to) {
  await api("POST", `/api/jobs/${number}/move`, { place: Math.max(1, to) });
  await look();
}

function makeDraggable(node, number) {
  const target = () => {
    const [from, to] = [rows.get(dragged)?.job, rows.get(number)?.job];
    return from && to && from.id !== to.id && to.state === "queued" && from.device === to.device ? to : null;
  };
  node.addEventListener("dragstart", (event) => {
    dragged = number;
    event.dataTransfer.effectAllowed = "move";
    event.dataTransfer.setData("text/plain", `job ${number}`);
  });
  node.addEventListener("dragover", (event) => {
    if (!target()) return;
    event.preventDefault();
    node.classList.add("over");
  });
  node.addEventListener("dragleave", () => node.classList.remove("over"));
  node.addEventListener("drop", (event) => {
    const [to, from] = [target(), dragged];
    if (!to) return;
    event.preventDefault();
    dragged = null;
    place(from, to.position).catch((error) => toast(error.message, "error"));
  });
  node.addEventListener("dragend", () => {
    dragged = null;
    for (const one of rows.values()) one.node.classList.remove("over");
  });
}

// --- pages and filters ------------------------------------------------------------------------------------------------

function showPages(found) {
  if (found.total > 0 && found.offset >= found.total) {
    turn(Math.floor((found.total - 1) / PAGE) * PAGE);
    return;
  }
  at("pages").hidden = found.total <= PAGE;
  at("page-of").textContent = `${found.offset + 1} to ${found.offset + found.jobs.length} of ${found.total}`;
  at("newer").disabled = found.offset === 0;
  at("older").disabled = found.offset + found.jobs.length >= found.total;
}

function turn(to) {
  offset = Math.max(0, to);
  return look();
}

for (const choice of document.querySelectorAll("[name=group]")) choice.addEventListener("change", () => turn(0));
let typing = 0;
at("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => turn(0), 200);
});
at("filters").addEventListener("submit", (event) => event.preventDefault());
at("show-all").addEventListener("click", () => {
  at("filters").reset();
  turn(0);
});
at("newer").addEventListener("click", () => turn(offset - PAGE));
at("older").addEventListener("click", () => turn(offset + PAGE));
at("serve").addEventListener("click", () => during(at("serve"), async () => {
  await api("POST", "/api/queue/serve");
  await look();
}));
document.addEventListener("visibilitychange", () => document.hidden || look());
setInterval(() => document.hidden || asking || look(), EVERY);
look();
