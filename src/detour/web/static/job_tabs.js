/* The tabs of a job that are text: log, files, job file, timeline. */
import { api, during, element, toast, whole } from "./app.js";
import { bytes, moment } from "./words.js";

const at = (id) => document.getElementById(id);
const POLL = 1500; // milliseconds between two looks at a log that is followed
const PIECE = 65_536; // bytes of a log that come at once
const MOST = 1_000_000; // characters of a log that the page keeps

/** What the last attempt printed: its end, followed. */
export class Log {
  constructor(root, detail) {
    this.root = root;
    this.detail = detail;
    this.offset = null;
    this.begin = 0;
    this.attempt = null;
    at("earlier").addEventListener("click", () => during(at("earlier"), () => this.earlier()));
    at("follow").addEventListener("change", () => this.refresh());
    at("log-text").addEventListener("scroll", () => {
      const text = at("log-text");
      if (text.scrollTop + text.clientHeight < text.scrollHeight - 40) at("follow").checked = false; // somebody reads
    });
    setInterval(() => this.tick(), POLL);
  }

  tick() {
    const state = this.detail()?.state;
    if (!at("log").hidden && !document.hidden && at("follow").checked && ["starting", "running", "stopping"].includes(state)) {
      this.refresh().catch((error) => (at("log-note").textContent = error.message));
    }
  }

  async refresh() {
    if (this.busy) return;
    this.busy = true;
    try {
      let found;
      do {
        const words = new URLSearchParams(this.offset === null ? {} : { offset: this.offset, attempt: this.attempt });
        found = await api("GET", `${this.root}/log?${words}`);
        this.take(found);
      } while (found.text && found.offset < found.size);
    } finally {
      this.busy = false;
    }
  }

  take(found) {
    const text = at("log-text");
    if (this.offset === null || found.reset) {
      text.textContent = "";
      this.begin = found.begin;
    }
    [this.offset, this.attempt] = [found.offset, found.attempt];
    if (found.text) text.append(found.text);
    if (text.textContent.length > MOST) {
      text.textContent = text.textContent.slice(-MOST / 2);
      this.begin = null; // how many bytes that is nobody counts: no earlier lines from here
    }
    text.hidden = this.offset === 0;
    at("no-log").hidden = this.offset > 0;
    at("earlier").hidden = !this.begin;
    at("log-note").textContent = found.attempt > 1 ? `attempt ${found.attempt}` : "";
    if (at("follow").checked) text.scrollTop = text.scrollHeight;
  }

  /** Put the lines before those that are shown above them. */
  async earlier() {
    const from = Math.max(0, this.begin - PIECE);
    const found = await api("GET", `${this.root}/log?offset=${from}&attempt=${this.attempt}&limit=${this.begin - from}`);
    const cut = from ? found.text.indexOf("\n") + 1 : 0; // with a whole line
    at("follow").checked = false;
    at("log-text").prepend(found.text.slice(cut));
    this.begin = from + new TextEncoder().encode(found.text.slice(0, cut)).length;
    at("earlier").hidden = !from;
  }
}

const KINDS = { lora: "LoRA", job: "job file of the last run", report: "report", events: "events", checkpoint: "checkpoint", model: "model folder" };

/** What the runs have made. */
export class Files {
  constructor(root) {
    this.root = root;
  }

  async refresh() {
    const found = await api("GET", `${this.root}/files`);
    at("no-files").hidden = found.files.length > 0;
    at("file-table").hidden = found.files.length === 0;
    at("file-table").tBodies[0].replaceChildren(...found.files.map((file) => element("tr", {},
      element("td", {}, file.name), element("td", {}, KINDS[file.kind] + (found.folders.length > 1 ? ` of process ${file.process}` : "")),
      element("td", {}, file.step === null ? "" : `step ${file.step}`), element("td", {}, bytes(file.bytes)),
      element("td", {}, moment(file.modified)), element("td", {}, this.link(file)))));
    const more = found.left_out ? ` ${found.left_out} more are not listed.` : "";
    at("file-folders").textContent = `In ${found.folders.join(" and ")}.${more}`;
  }

  link(file) {
    if (!file.download) return "";
    const href = `${this.root}/files/${file.process}/${encodeURIComponent(file.name)}`;
    return element("a", { class: "button", href, download: file.name, "aria-label": `Download ${file.name}` }, "Download");
  }
}

/** The job file in three forms. */
export class JobFile {
  constructor(root) {
    this.root = root;
    for (const choice of document.querySelectorAll("[name=which]")) choice.addEventListener("change", () => this.show());
    at("copy").addEventListener("click", () => during(at("copy"), async () => {
      await navigator.clipboard.writeText(at("text").textContent);
      toast("Copied.");
    }));
  }

  async refresh() {
    this.found = await api("GET", `${this.root}/text`);
    at("ran-choice").hidden = this.found.ran === null;
    at("text-trouble").hidden = !this.found.trouble;
    at("text-trouble").textContent = this.found.trouble;
    this.show();
  }

  show() {
    const which = document.querySelector("[name=which]:checked").value;
    const changed = this.found.ran !== null && this.found.resolved && this.found.ran !== this.found.resolved;
    const notes = [...this.found.notes, ...(changed ? ["The job file has been changed since it ran last, or paths and versions have."] : [])];
    at("text").textContent = this.found[which];
    at("text-note").textContent = notes.join(" · ");
  }
}

/** What happened, the newest first. */
export class Timeline {
  constructor(root) {
    this.root = root;
  }

  async refresh() {
    await whole(`${this.root}/timeline`, (found) => this.show(found));
  }

  show(found) {
    at("left-out").hidden = found.left_out === 0;
    at("left-out").textContent = `${found.left_out} older entries are not shown; events.jsonl has them.`;
    const entries = found.moments.map((one) => this.entry(one));
    [...at("moments").children].reverse().forEach((old, place) => { // what somebody has opened stays open
      const [before, now] = [old.querySelector("details"), entries[place]?.querySelector("details")];
      if (before?.open && now) now.open = true;
    });
    at("moments").replaceChildren(...entries.reverse());
  }

  entry({ kind, time, step, text, details }) {
    const when = element("span", { class: "quiet" }, time === null ? "" : moment(time), step === null ? "" : ` · step ${step}`);
    const list = details.length
      ? element("details", {}, element("summary", {}, details.length === 1 ? "one detail" : `${details.length} details`), element("ul", {}, ...details.map((line) => element("li", {}, line))))
      : null;
    const label = kind === "warning" ? "Warning: " : "";
    return element("li", { class: kind }, when, element("div", {}, element("p", {}, label, text), list));
  }
}
