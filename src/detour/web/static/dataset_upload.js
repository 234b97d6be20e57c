/* Adding files: several at once, with one bar for all of them. Only what went wrong gets a line of its own. */
import { element, toast } from "./app.js";
import { address, at, changed, count } from "./dataset_tools.js";

const AT_ONCE = 3;
const SHOWN = 100; // problems with a line; the rest is counted

let queue = [];
let active = new Map(); // requests under way, with the bytes that have gone
let total = 0, gone = 0, done = 0, all = 0, added = 0, same = 0, problems = 0;

/** Upload these files; more may be added while others are on their way. */
function add(files) {
  if (!files.length) return;
  if (!active.size && !queue.length) {
    total = gone = done = all = added = same = problems = 0;
    at("upload-problems").replaceChildren();
  }
  for (const file of files) queue.push({ file, replace: false });
  all += files.length;
  total += [...files].reduce((sum, file) => sum + file.size, 0);
  at("uploading").hidden = false;
  while (active.size < AT_ONCE && queue.length) next();
  show();
}

function next() {
  const job = queue.shift();
  if (!job) return;
  const request = new XMLHttpRequest();
  active.set(request, 0);
  request.open("PUT", address("files", job.file.name, job.replace ? { replace: "true" } : {}));
  request.setRequestHeader("Content-Type", "application/octet-stream");
  request.responseType = "json";
  request.upload.addEventListener("progress", (event) => {
    active.set(request, Math.min(event.loaded, job.file.size));
    show();
  });
  request.addEventListener("loadend", () => {
    active.delete(request);
    gone += job.file.size;
    done += 1;
    finish(job, request);
    if (queue.length) next();
    else if (!active.size) end();
    show();
  });
  request.send(job.file);
}

function finish(job, request) {
  const answer = request.response;
  if (request.status === 200) {
    added += answer.added + answer.replaced;
    same += answer.same;
    for (const reason of answer.left_out) problem(reason);
    return;
  }
  if (request.status === 0) {
    problem(`${job.file.name}: the upload was stopped or the server does not answer`, job);
  } else {
    problem(answer?.error ?? `${job.file.name}: ${request.status}`, job, request.status === 409);
  }
}

function problem(text, job = null, taken = false) {
  problems += 1;
  if (problems > SHOWN) return;
  const line = element("li", { class: "row error" }, element("span", { class: "grow wrap" }, text));
  if (job) {
    const again = element("button", { type: "button", class: "small" }, taken ? "Replace" : "Try again");
    again.addEventListener("click", () => {
      line.remove();
      all += 1;
      total += job.file.size;
      queue.push({ file: job.file, replace: taken });
      at("uploading").hidden = false;
      if (active.size < AT_ONCE) next();
      show();
    });
    line.append(again);
  }
  at("upload-problems").append(line);
}

function show() {
  const sent = gone + [...active.values()].reduce((sum, bytes) => sum + bytes, 0);
  at("upload-bar").max = Math.max(1, total);
  at("upload-bar").value = sent;
  const waits = active.size && sent >= total;
  if (waits) at("upload-bar").removeAttribute("value"); // all is there, and is being unpacked or checked
  at("upload-state").textContent = waits ? `${done} of ${all} done; checking what has come …` : `${done} of ${all} done`;
}

function end() {
  at("uploading").hidden = true;
  const parts = [`${count(added, "file")} added`];
  if (same) parts.push(`${same} were there already`);
  if (problems) parts.push(`${problems} not added`);
  toast(`${parts.join(", ")}.`);
  if (added) changed();
}

at("files").addEventListener("change", () => {
  add([...at("files").files]);
  at("files").value = "";
});
at("upload-stop").addEventListener("click", () => {
  queue = [];
  for (const request of [...active.keys()]) request.abort();
});
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    at("drop").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) at("drop").classList.remove("over");
});
document.addEventListener("drop", async (event) => {
  at("drop").classList.remove("over");
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  add(await dropped(event.dataTransfer));
});
window.addEventListener("beforeunload", (event) => {
  if (active.size) event.preventDefault();
});

/** The files that were dropped, and those in folders that were. */
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return [...transfer.files];
  const found = [];
  for (const entry of entries) await collect(entry, found);
  return found;
}

async function collect(entry, found) {
  if (entry.name.startsWith(".")) return;
  if (entry.isFile) {
    found.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    const part = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!part.length) return;
    for (const inner of part) await collect(inner, found);
  }
}
