/* The export page: a LoRA in a format, ComfyUI's folder, the model card. */
import { api, during, element } from "./app.js";

const at = (id) => document.getElementById(id);
const job = at("export").dataset.job;
const root = `/api/jobs/${job}`;
const PAUSE = 700; // milliseconds between two looks at something that is being made

const HELP = {
  comfy: "For ComfyUI. Most other programs read it too.",
  diffusers: "For Python: diffusers' load_lora_weights.",
  kohya: "For Forge, A1111 and programs of their kind.",
};

let state = null;
let looking = false;
let asked = 0; // the newest question for a card: late answers to older ones are dropped

const size = (bytes) => (bytes >= 2 ** 20 ? `${(bytes / 2 ** 20).toFixed(1)} MiB` : `${Math.max(1, Math.round(bytes / 1024))} KiB`);
const lora = () => state.loras.find((one) => one.id === at("lora").value);
const exportId = () => `${lora().id}.${at("format").value}`;
const chosen = () => state.files.find((file) => file.id === exportId());
const own = () => at("format").value === lora().format;

function show(id, shown) {
  at(id).hidden = !shown;
}

function fill(select, entries) {
  const before = select.value;
  select.replaceChildren(...entries.map(([value, text]) => element("option", { value }, text)));
  if (entries.some(([value]) => value === before)) select.value = before;
}

function nameOf(one) {
  const which = one.step === null ? "finished" : `step ${one.step}`;
  const process = state.loras.some((other) => other.process !== one.process) ? `process ${one.process}, ` : "";
  return `${process}${which} (${one.name}, ${size(one.bytes)})`;
}

/** Look at what there is, again and again as long as something is being made. */
async function look() {
  if (looking) return;
  looking = true;
  try {
    for (;;) {
      state = await api("GET", `${root}/exports`);
      render();
      if (!state.files.some((file) => file.state === "running") && state.sent?.state !== "running") return;
      await new Promise((resolve) => setTimeout(resolve, PAUSE));
    }
  } catch (error) {
    show("loading", true);
    at("loading").textContent = error.message;
    at("loading").className = "error";
  } finally {
    looking = false;
  }
}

function render() {
  show("loading", false);
  show("nothing", state.loras.length === 0);
  show("export", state.loras.length > 0);
  if (state.loras.length === 0) return;
  fill(at("lora"), state.loras.map((one) => [one.id, nameOf(one)]));
  renderFormats();
  renderFile();
  renderComfyui();
}

function renderFormats() {
  fill(at("format"), lora().formats.map((format) => [format, format === lora().format ? `${format} (as it is)` : format]));
  at("format-help").textContent = HELP[at("format").value];
}

let card = null; // the file that the card shown is about

function renderFile() {
  const file = chosen();
  const ready = own() || file?.state === "done";
  show("make", !ready && file?.state !== "running");
  show("download", ready);
  show("making", file?.state === "running");
  show("make-error", file?.state === "failed");
  at("make-error").textContent = file?.error ?? "";
  if (file?.state === "running") {
    at("making").querySelector(".help").textContent = `Converted, loaded back and compared: ${Math.round(file.seconds)} s, about 10 s for most.`;
  }
  at("file-notes").replaceChildren(...(file?.notes ?? []).map((note) => element("li", {}, note)));
  at("file-facts").textContent = own() ? `${lora().name}, ${size(lora().bytes)}` : ready ? `${file.name}, ${size(file.bytes)}, ${file.proof}` : "";
  if (ready) at("download").href = `${root}/exports/${encodeURIComponent(exportId())}`;
  show("card-wait", !ready);
  for (const id of ["card-download", "card-archive", "card-facts"]) show(id, ready);
  if (!ready) card = null;
  else if (card !== exportId()) renderCard();
}

function renderComfyui() {
  at("how").textContent = state.how;
  show("no-comfyui", state.comfyui === null);
  show("send-form", state.comfyui !== null);
  at("comfyui-folder").textContent = state.comfyui ?? "";
  if (!at("send-name").dataset.touched) at("send-name").value = lora().name.replace(/\.safetensors$/, "");
  const sent = state.sent;
  show("sending", sent?.state === "running");
  show("sent", sent?.state === "done");
  show("send-error", sent?.state === "failed");
  at("send").disabled = sent?.state === "running";
  if (sent?.state === "running") at("sending").querySelector(".help").textContent = `Converted, loaded back and copied: ${Math.round(sent.seconds)} s.`;
  else if (sent?.state === "done") at("sent").textContent = sent.says;
  else if (sent?.state === "failed") at("send-error").textContent = sent.says;
}

/** The card of what is chosen, as text and as links. */
async function renderCard() {
  card = exportId();
  const number = ++asked;
  const query = new URLSearchParams({ base: at("card-base").value.trim(), repository: at("card-repository").value.trim() });
  const address = `${root}/card/${encodeURIComponent(card)}`;
  at("card-download").href = `${address}/README.md?${query}`;
  at("card-archive").href = `${address}/archive.zip?${query}`;
  show("card-error", false);
  try {
    const found = await api("GET", `${address}?${query}`);
    if (number !== asked) return;
    at("card-text").textContent = found.text;
    at("card-facts").textContent = `${size(found.bytes)} with ${found.pictures} pictures`;
  } catch (error) {
    if (number !== asked) return;
    at("card-text").textContent = "";
    at("card-facts").textContent = "";
    at("card-error").textContent = error.message;
    show("card-error", true);
  }
}

at("lora").addEventListener("change", render);
at("format").addEventListener("change", () => {
  renderFormats();
  renderFile();
});

at("make").addEventListener("click", () =>
  during(at("make"), async () => {
    await api("POST", `${root}/exports`, { lora: lora().id, format: at("format").value });
    look();
  }),
);

at("send-name").addEventListener("input", () => {
  at("send-name").dataset.touched = "yes";
  at("replace").checked = false;
  show("replace-row", false);
});

at("send-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  show("send-error", false);
  show("sent", false);
  try {
    await api("POST", `${root}/comfyui`, { lora: lora().id, name: at("send-name").value.trim(), replace: at("replace").checked });
    at("replace").checked = false;
    show("replace-row", false);
    look();
  } catch (error) {
    at("send-error").textContent = error.message;
    show("send-error", true);
    show("replace-row", error.status === 409);
  }
});

for (const id of ["card-base", "card-repository"]) at(id).addEventListener("change", renderCard);

look().then(() => {
  if (state?.base) {
    at("card-base").value = state.base;
    at("card-base").disabled = true; // the job says it
  }
});
