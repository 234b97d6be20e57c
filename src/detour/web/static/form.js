/* The page of a new job. The YAML is the truth: a change to a field asks the server for the text with that one change,
   a change to the text asks it for what the fields show. What was typed is kept in this tab until it is submitted. */

import { api, during, element, toast } from "./app.js";
import { showJob, showPresets } from "./form_about.js";
import { commandFor, saveAs } from "./form_command.js";
import { Editor } from "./form_editor.js";
import { Field, Rows, explained, shown, valueAt } from "./form_fields.js";
import { filter } from "./form_filter.js";

const byId = (id) => document.getElementById(id);
const MEMORY = `detour.form${location.pathname}${location.search}`;
const SOON = 250; // ms after the last key

let description; // the fields and presets
let start; // what the page began with
let state; // of the text as it was read last
let good; // the last one that could be read: what the fields show
let process = 0;
let built = ""; // the process that the fields were made for
let isNew = true; // nothing is shown as wrong before it was touched
let registry = new Map(); // path -> Field or Rows
const waiting = new Map(); // path -> value that is not in the text yet
const refused = new Map(); // path -> why it could not be put into the text
const touched = new Set();
const before = []; // texts before the form's changes
let work = Promise.resolve(); // one request after the other
const timers = new Map();

const editor = new Editor(byId("text"), byId("gutter"), () => {
  remember();
  later(readText);
});

const host = {
  changed(path, value, soon) {
    const field = registry.get(path);
    if (soon && field && !waiting.has(path) && same(field, value)) return;
    touched.add(path);
    refused.delete(path);
    waiting.set(path, value);
    withDataset(path, value);
    remember();
    if (soon) sendWaiting();
    else later(sendWaiting);
  },
  left(path) {
    if (!waiting.has(path)) showField(registry.get(path));
  },
  listed(change) {
    inTurn(() => changeText("/api/form/list", { ...change, path: full(change.path) })).then(() => registry.get(change.path)?.follow(change));
  },
  picker: (path) => (path.endsWith(".folder_path") ? start.datasets : null),
  remember: (field) => registry.set(field.path, field),
  forget: (field) => registry.delete(field.path),
};

/** The path in the file. */
const full = (path) => (path.startsWith("config.") ? path : `config.process[${process}].${path}`);
const kind = () => good.kinds[process] ?? Object.keys(description.kinds)[0];
const preset = () => description.presets.find((one) => one.name === good.preset);

function later(action) {
  clearTimeout(timers.get(action));
  timers.set(action, setTimeout(action, SOON));
}

/** Do something when everything before it is done. What goes wrong is shown. */
function inTurn(action) {
  work = work.then(action).catch((error) => toast(error.message, "error"));
  return work;
}

/** A new dataset brings the ending of its captions and its trigger word. */
function withDataset(path, value) {
  const chosen = path.endsWith(".folder_path") && start.datasets.find((dataset) => dataset.path === value);
  if (!chosen) return;
  waiting.set(path.replace(/folder_path$/, "caption_ext"), chosen.caption_ext);
  if (chosen.trigger_word && !valueAt(good.values, full("trigger_word"))) waiting.set("trigger_word", chosen.trigger_word);
}

/** Whether a field shows that value already, as after the text was changed from it. */
function same(field, value) {
  const now = valueAt(good.values, full(field.path));
  return field instanceof Field && typeof value === "string" && String(now ?? "") === value;
}

// --- text and fields -------------------------------------------------------------------------------------------------

/** Put the changes of fields into the text, one by one. Those that cannot be put there yet stay for later. */
function sendWaiting() {
  clearTimeout(timers.get(sendWaiting));
  return inTurn(async () => {
    for (const path of [...waiting.keys()]) {
      if (!waiting.has(path)) continue;
      const value = waiting.get(path);
      const sent = editor.text;
      let answer;
      try {
        answer = await api("POST", "/api/form/set", { text: sent, process, path: full(path), value });
      } catch (error) {
        if (error.status !== 400) throw error;
        const now = await api("POST", "/api/form/read", { text: editor.text, process });
        take(now);
        if (now.broken) return;
        refused.set(path, error.message);
        waiting.delete(path);
        refresh();
        continue;
      }
      if (editor.text !== sent) {
        later(sendWaiting);
        return;
      }
      if (waiting.get(path) === value) waiting.delete(path);
      replace(answer);
    }
  });
}

/** Another change to the text, by the server. */
async function changeText(address, body) {
  for (;;) {
    const sent = editor.text;
    const answer = await api("POST", address, { text: sent, process, ...body });
    if (editor.text === sent) {
      replace(answer);
      return;
    }
  }
}

function replace(answer) {
  if (answer.text !== editor.text) {
    before.push(editor.text);
    if (before.length > 100) before.shift();
  }
  editor.set(answer.text);
  take(answer);
}

/** The text was changed by hand. */
function readText() {
  clearTimeout(timers.get(readText));
  return inTurn(async () => {
    const sent = editor.text;
    const answer = await api("POST", "/api/form/read", { text: sent, process });
    if (editor.text !== sent) return;
    take(answer);
    if (!answer.broken && waiting.size) sendWaiting();
  });
}

function take(answer) {
  state = answer;
  if (!answer.broken) {
    good = answer;
    if (process >= good.kinds.length) process = 0;
    if (built !== `${process} ${kind()}`) build();
  }
  remember();
  refresh();
}

// --- what is shown ---------------------------------------------------------------------------------------------------

/** Make all fields of the kind of process. */
function build() {
  registry = new Map();
  built = `${process} ${kind()}`;
  const groups = description.kinds[kind()];
  const all = groups.flatMap((group) => group.fields).filter((field) => field.path !== "model.arch" || !hasPresets());
  const make = (about) => {
    const made = ["rows", "texts"].includes(about.kind) ? new Rows(about, about.path, host) : new Field(about, about.path, host);
    registry.set(about.path, made);
    return made.element;
  };
  const isFirst = (about) =>
    about.first === "always" || about.first === "distilled" || (about.first === "given" && valueAt(good.values, full(about.path)) !== undefined);
  const order = description.first;
  const first = all.filter(isFirst).sort((one, other) => order.indexOf(one.path) - order.indexOf(other.path));
  byId("first").className = "few";
  byId("first").replaceChildren(...first.map(make));
  byId("groups").replaceChildren(
    ...groups.map((group) => {
      const fields = group.fields.filter((about) => all.includes(about) && !first.includes(about));
      if (!fields.length) return null;
      return element(
        "details", { class: "group", "data-group": group.name, open: group.name === "" },
        element("summary", {}, element("h3", {}, group.title), " ", element("span", { class: "quiet" }, `${fields.length}`)),
        element("p", { class: "help" }, ...explained(group.help)),
        element("div", { class: "few" }, ...fields.map(make)),
      );
    }).filter(Boolean),
  );
  for (const path of ["config.output_name", "model.name_or_path", "model.assistant_lora_path", "datasets"]) {
    registry.get(path)?.element.classList.add("wide");
  }
}

const hasPresets = () => registryHas("datasets");
const registryHas = (path) => description.kinds[kind()].some((group) => group.fields.some((field) => field.path === path));

function showField(field) {
  if (!field) return;
  const value = waiting.has(field.path) ? (waiting.get(field.path) ?? undefined) : valueAt(good.values, full(field.path));
  if (field instanceof Rows) field.show(value);
  else field.show(value, field.about.default ?? good.defaults[field.path]);
}

function refresh() {
  for (const field of [...registry.values()]) if (field instanceof Rows) showField(field);
  for (const field of registry.values()) showField(field);
  const adapter = registry.get("model.assistant_lora_path");
  if (adapter) adapter.element.hidden = !(preset()?.distilled || valueAt(good.values, full(adapter.path)) !== undefined);
  byId("fields").disabled = good.foreign;
  byId("foreign").hidden = !good.foreign;
  byId("notes").replaceChildren(...good.notes.map((note) => element("li", {}, note)));
  byId("undo").disabled = !before.length;
  showProcesses();
  showPreset();
  showErrors();
  byId("command").textContent = commandFor(start.folder, jobName());
  filter(registry);
}

function showProcesses() {
  byId("process-field").hidden = good.kinds.length < 2;
  byId("process").replaceChildren(
    ...good.kinds.map((name, place) => element("option", { value: place, selected: place === process }, `${place + 1}: ${name}`)),
  );
}

function showPreset() {
  byId("preset-field").hidden = !hasPresets();
  byId("preset").value = good.preset ?? "";
  const differences = good.preset ? good.differences : [];
  byId("differences").hidden = !differences.length;
  byId("differences").querySelector("ul").replaceChildren(
    ...differences.map((one) => {
      const take = element("button", { type: "button", class: "link" }, `Take the preset's ${one.label}`);
      take.addEventListener("click", () => choosePreset(good.preset, [one.path]));
      return element("li", {}, `${one.label}: ${shown(one.value)} (preset: ${shown(one.preset)}). `, take);
    }),
  );
  byId("warnings").hidden = !good.warnings.length;
  byId("warnings").replaceChildren(...good.warnings.map((text) => element("li", {}, text)));
}

/** Each mistake at its field; what has none on top, with its line. */
function showErrors() {
  const at = new Map([...refused].map(([path, text]) => [registry.get(path), [text]]));
  const rest = [];
  for (const error of state.errors) {
    const field = fieldOf(error.where);
    if (!field) rest.push(error);
    else if (!isNew || touched.has(field.path)) at.set(field, [...(at.get(field) ?? []), error.message]);
  }
  for (const field of registry.values()) field.fail((at.get(field) ?? []).join("\n"));
  byId("problems").hidden = !rest.length;
  byId("problems").querySelector("ul").replaceChildren(
    ...rest.map((error) => {
      const text = [error.where, error.message].filter(Boolean).join(": ");
      return element("li", {}, error.line ? lineLink(error.line) : null, error.line ? ` ${text}` : text);
    }),
  );
  const seen = state.errors.filter((error) => !isNew || rest.includes(error) || touched.has(fieldOf(error.where)?.path));
  editor.mark(new Map(seen.filter((error) => error.line).map((error) => [error.line, error.message])));
  byId("text-state").className = state.broken ? "error" : "quiet";
  byId("text-state").textContent = state.broken
    ? "This is not readable YAML. The fields show the job as it was before; nothing is lost."
    : waiting.size ? "Changes are on their way." : "";
  showTodo();
}

function showTodo() {
  const fields = [...new Set(state.errors.map((error) => fieldOf(error.where)).filter(Boolean))];
  const links = fields.map((field) => {
    const link = element("button", { type: "button", class: "link" }, field.about.label);
    link.addEventListener("click", () => field.focus());
    return link;
  });
  const parts = links.flatMap((link, place) => (place ? [", ", link] : [link]));
  const others = state.errors.filter((error) => !fieldOf(error.where)).length;
  if (others) parts.push(parts.length ? " and what stands on top" : "what stands on top");
  byId("todo").replaceChildren(...(parts.length ? ["Still to be put right: ", ...parts, "."] : ["Everything that can be seen from here is right."]));
}

function lineLink(line) {
  const link = element("button", { type: "button", class: "link" }, `Line ${line}:`);
  link.addEventListener("click", () => {
    byId("yaml").open = true;
    editor.goto(line);
  });
  return link;
}

/** The field that an error belongs to: its own, or the list around it. */
function fieldOf(where) {
  const own = `config.process[${process}].`;
  let path = where.startsWith(own) ? where.slice(own.length) : where.startsWith("config.process") ? "" : where;
  while (path && !registry.has(path)) path = path.replace(/(\.[^.[\]]+|\[\d+\]|^[^.[\]]+)$/, "");
  const field = registry.get(path);
  return field?.element.hidden ? undefined : field;
}

const jobName = () => String(valueAt(good.values, "config.output_name") ?? valueAt(good.values, "config.name") ?? "") || "job";

// --- what a person does ----------------------------------------------------------------------------------------------

function choosePreset(name, overwrite = []) {
  return inTurn(() => changeText("/api/form/preset", { preset: name, overwrite }));
}

/** Everything is in the text and read; the mistakes are shown. True if there are none. `quiet` stays where it is. */
async function settled(quiet) {
  for (let tries = 0; waiting.size && tries < 5; tries += 1) await sendWaiting();
  await readText();
  isNew = false;
  refresh();
  if (waiting.size) throw new Error("The YAML cannot be read, so some changes of fields are not in it yet. Put it right first.");
  if (!state.errors.length) return true;
  if (quiet) return false;
  const first = state.errors.map((error) => fieldOf(error.where)).find(Boolean);
  if (first) first.focus();
  else byId("problems").scrollIntoView({ block: "center" });
  return false;
}

async function submit(queued) {
  byId("failure").hidden = true;
  try {
    const keeps = !queued && (start.edit?.draft ?? true); // a draft may have mistakes
    if (!(await settled(keeps)) && !keeps) return;
    const done = start.edit ? await saveEdited(queued) : await addNew(queued);
    sessionStorage.removeItem(MEMORY);
    leaving = true;
    location.assign(`/jobs/${done.job.id}`);
  } catch (error) {
    byId("failure").textContent = error.message;
    byId("failure").hidden = false;
  }
}

const addNew = (queued) => api("POST", "/api/jobs", { text: editor.text, queued, like: start.copy_of?.id ?? null });

async function saveEdited(queued) {
  const saved = await api("PUT", `/api/jobs/${start.edit.id}`, { text: editor.text, draft: !queued });
  return queued && saved.job.state !== "queued" ? api("POST", `/api/jobs/${start.edit.id}/start`) : saved;
}

async function check() {
  const box = byId("report");
  box.hidden = false;
  box.replaceChildren(element("p", {}, "Looking at every picture…"), element("progress"));
  try {
    if (waiting.size) await sendWaiting();
    const like = start.edit?.id ?? start.copy_of?.id ?? null;
    const report = await api("POST", "/api/form/check", { text: editor.text, like });
    const item = (found) => element("li", { class: "error" }, found.line ? lineLink(found.line) : null, ` ${found.message}`);
    box.replaceChildren(
      element("p", {}, report.ok ? "Nothing stands in the way." : "This has to be put right:"),
      element("ul", {}, ...report.errors.map(item), ...report.warnings.map((text) => element("li", {}, `warning: ${text}`)), ...report.summary.map((text) => element("li", {}, text))),
    );
  } catch (error) {
    box.replaceChildren(element("p", { class: "error" }, error.message));
  }
}

function undo() {
  const text = before.pop();
  if (text === undefined) return;
  waiting.clear();
  refused.clear();
  editor.set(text);
  readText();
}

// --- the tab's memory ------------------------------------------------------------------------------------------------

let leaving = false;

function remember() {
  if (leaving || !start) return;
  const kept = {
    text: editor.text, from: start.form.text, waiting: [...waiting], touched: [...touched], process, isNew,
    more: byId("more").open, good: good?.text,
  };
  try {
    sessionStorage.setItem(MEMORY, JSON.stringify(kept));
  } catch {
    byId("text-state").textContent = "This browser keeps nothing for this tab: a reload would lose what you type.";
  }
}

/** Show what this tab remembers, if that is more than the page begins with. */
async function restore() {
  const kept = JSON.parse(sessionStorage.getItem(MEMORY) ?? "null");
  if (!kept || (kept.text === start.form.text && !kept.waiting.length)) return;
  for (const [path, value] of kept.waiting) waiting.set(path, value);
  for (const path of kept.touched) touched.add(path);
  ({ process, isNew } = kept);
  byId("more").open = kept.more;
  editor.set(kept.text);
  byId("restored").hidden = false;
  if (kept.from !== start.form.text) {
    byId("restored-text").textContent = "What you had typed here is back. The job file it began with has changed since.";
  }
  take(await api("POST", "/api/form/read", { text: kept.good ?? start.form.text, process }));
  await readText();
}

// --- the beginning ---------------------------------------------------------------------------------------------------

function wire() {
  byId("form").addEventListener("submit", (event) => event.preventDefault());
  byId("preset").addEventListener("change", (event) => choosePreset(event.target.value));
  byId("all-of-preset").addEventListener("click", () => choosePreset(good.preset, good.differences.map((one) => one.path)));
  byId("process").addEventListener("change", (event) => {
    process = Number(event.target.value);
    readText();
  });
  byId("translate").addEventListener("click", () => inTurn(() => changeText("/api/form/translate", {})));
  byId("filter").addEventListener("input", () => filter(registry));
  byId("more").addEventListener("toggle", remember);
  byId("undo").addEventListener("click", undo);
  byId("download").addEventListener("click", () => saveAs(jobName(), editor.text));
  byId("queue").addEventListener("click", (event) => during(event.target, () => submit(true)));
  byId("draft").addEventListener("click", (event) => during(event.target, () => submit(false)));
  byId("check").addEventListener("click", (event) => during(event.target, check));
  byId("start-over").addEventListener("click", () => {
    leaving = true;
    sessionStorage.removeItem(MEMORY);
    location.reload();
  });
  addEventListener("pagehide", remember);
}

async function begin() {
  [description, start] = await Promise.all([api("GET", "/api/form"), api("GET", `/api/form/start${location.search}`)]);
  showPresets(description.presets);
  showJob(start);
  wire();
  isNew = !start.edit && !start.copy_of;
  editor.set(start.form.text);
  if (matchMedia("(max-width: 60rem)").matches) byId("yaml").open = false;
  const kept = sessionStorage.getItem(MEMORY);
  if (start.form.broken) take((await api("GET", "/api/form/start")).form); // a draft: fields need something to show
  take(start.form);
  if (kept) sessionStorage.setItem(MEMORY, kept);
  await restore();
  byId("loading").hidden = true;
  byId("page").hidden = false;
}

begin().catch((error) => {
  byId("loading").className = "error";
  byId("loading").textContent = error.message;
});
