/* Previews: a scrubber over steps, the matrix of prompts and steps, and a viewer that compares two pictures. */
import { element } from "./app.js";

const COLUMNS = 12; // of the matrix, unless all are asked for

/** Where the pictures of a job are. */
export function pictures(job, samples) {
  const version = new Map(samples.steps.map((column) => [column.step, column.version]));
  const there = new Map(samples.steps.map((column) => [column.step, new Set(column.pictures)]));
  const others = new Map(samples.steps.map((column) => [column.step, column.others]));
  const root = (step, index) => `/api/jobs/${job}/samples/${samples.process}/${step}/${index}`;
  return {
    job, samples, steps: samples.steps.map((column) => column.step),
    has: (step, index) => there.get(step)?.has(index) ?? false,
    whole: (step, index) => `${root(step, index)}?v=${version.get(step)}`,
    small: (step, index, size = 320) => `${root(step, index)}/thumbnail?size=${size}&v=${version.get(step)}`,
    prompt: (step, index) => others.get(step)?.[index] ?? samples.prompts.find((row) => row.index === index)?.prompt ?? "",
    seed: (index) => samples.prompts.find((row) => row.index === index)?.seed ?? null,
  };
}

/** Some of a list, evenly, with the first and the last. */
export function evenly(list, most) {
  if (list.length <= most) return list;
  return Array.from({ length: most }, (_, at) => list[Math.round((at * (list.length - 1)) / (most - 1))]);
}

/** A scrubber: a slider over steps with buttons for the one before and the next. `onstep` gets the step. */
export class Scrubber {
  constructor(parent, onstep) {
    this.steps = [];
    this.onstep = onstep;
    this.slider = element("input", { type: "range", id: "scrubber", min: 0, max: 0, step: 1, value: 0, class: "grow", oninput: () => this.moved() });
    this.shown = element("output", { for: "scrubber" });
    this.back = element("button", { type: "button", "aria-label": "Step before", onclick: () => this.by(-1) }, "‹");
    this.next = element("button", { type: "button", "aria-label": "Next step", onclick: () => this.by(1) }, "›");
    parent.append(element("label", { for: "scrubber" }, "Step"), this.back, this.slider, this.next, this.shown);
  }

  get step() {
    return this.steps[Number(this.slider.value)] ?? null;
  }

  /** Take other steps. Stays where it was, and at the end if it stood there. */
  set(steps) {
    const [before, atEnd] = [this.step, this.steps.length === 0 || Number(this.slider.value) === this.steps.length - 1];
    this.steps = steps;
    this.slider.max = Math.max(0, steps.length - 1);
    this.go(atEnd ? steps.at(-1) : before);
  }

  /** Go to a step, or the one nearest to it. */
  go(step) {
    if (!this.steps.length) return;
    const wanted = step ?? this.steps.at(-1);
    let best = 0;
    this.steps.forEach((one, at) => (best = Math.abs(one - wanted) < Math.abs(this.steps[best] - wanted) ? at : best));
    this.slider.value = best;
    this.moved();
  }

  by(count) {
    this.slider.value = Number(this.slider.value) + count;
    this.moved();
  }

  moved() {
    const at = Number(this.slider.value);
    this.shown.textContent = `${this.step} (${at + 1} of ${this.steps.length})`;
    this.slider.setAttribute("aria-valuetext", `step ${this.step}`);
    this.back.disabled = at === 0;
    this.next.disabled = at === this.steps.length - 1;
    this.onstep(this.step);
  }
}

/** The matrix as a table: rows are prompts, columns steps. `onopen(step, index)` when a picture is clicked. */
export function matrix(source, { all = false, onopen }) {
  const steps = all ? source.steps : evenly(source.steps, COLUMNS);
  const head = element("tr", {}, element("th", { scope: "col" }, "Prompt"), ...steps.map((step) => element("th", { scope: "col" }, `step ${step}`)));
  const rows = source.samples.prompts.map((row) => element("tr", {},
    element("th", { scope: "row", title: row.prompt ?? "" }, element("span", { class: "prompt" }, row.prompt ?? `prompt ${row.index + 1}`)),
    ...steps.map((step) => element("td", {}, source.has(step, row.index) ? small(source, step, row.index, onopen) : "–"))));
  return element("table", { class: "matrix" }, element("thead", {}, head), element("tbody", {}, ...rows));
}

function small(source, step, index, onopen) {
  const picture = element("img", { src: source.small(step, index, 160), loading: "lazy", alt: "" });
  return element("button", { type: "button", class: "picture", "aria-label": `Prompt ${index + 1} at step ${step}`, onclick: () => onopen(step, index) }, picture);
}

/**
 * The viewer: a picture in a dialog, with another to hold against it or to wipe over it.
 *
 * `show` gets {title, text, picture: {address, label}, other: {address, label} | null, left, right, up, down}; the last
 * four are called for the arrow keys, or null.
 */
export class Viewer {
  constructor() {
    this.title = element("h2", { id: "viewer-title" });
    this.text = element("p", { class: "prompt-text" });
    this.picture = element("img", { alt: "", class: "below" });
    this.other = element("img", { alt: "", class: "above" });
    this.stage = element("div", { class: "canvas" }, this.picture, this.other);
    this.label = element("span", { class: "quiet", "aria-live": "polite" });
    this.hold = element("button", { type: "button" }, "Hold to compare");
    this.wipe = element("input", { type: "range", min: 0, max: 100, value: 0, id: "wipe", class: "grow", oninput: () => this.compare() });
    this.tools = element("div", { class: "row" }, this.hold, element("label", { for: "wipe" }, "Wipe"), this.wipe);
    this.original = element("a", { class: "button", target: "_blank", rel: "noopener" }, "Open the original");
    this.moves = {};
    const arrow = (name, text, label) => (this.moves[name] = element("button", { type: "button", "aria-label": label, onclick: () => this.state[name]?.() }, text));
    const close = element("button", { type: "button", onclick: () => this.dialog.close() }, "Close");
    this.dialog = element("dialog", { class: "viewer", "aria-labelledby": "viewer-title" },
      element("div", { class: "row" }, element("div", { class: "grow" }, this.title), close), this.stage, this.label, this.tools,
      element("div", { class: "row" }, arrow("left", "‹", "Step before"), arrow("right", "›", "Next step"),
        arrow("up", "⌃", "Prompt before"), arrow("down", "⌄", "Next prompt"), this.original), this.text);
    document.body.append(this.dialog);
    this.listen();
  }

  listen() {
    const hold = (on) => () => this.held(on);
    this.hold.addEventListener("pointerdown", hold(true));
    for (const name of ["pointerup", "pointerleave", "pointercancel", "blur"]) this.hold.addEventListener(name, hold(false));
    this.dialog.addEventListener("keydown", (event) => {
      const name = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down" }[event.key];
      if (name && event.target !== this.wipe) {
        event.preventDefault();
        this.state[name]?.();
      } else if (event.key === " " && event.target === this.hold) {
        event.preventDefault();
        this.held(true);
      }
    });
    this.dialog.addEventListener("keyup", (event) => event.key === " " && this.held(false));
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
  }

  show(state) {
    this.state = state;
    this.title.textContent = state.title;
    this.text.textContent = state.text;
    this.picture.src = state.picture.address;
    this.picture.alt = `${state.picture.label}: ${state.text}`;
    this.original.href = state.picture.address;
    this.tools.hidden = !state.other;
    this.other.hidden = !state.other;
    if (state.other) this.other.src = state.other.address;
    else this.other.removeAttribute("src");
    for (const [name, button] of Object.entries(this.moves)) button.disabled = !state[name];
    this.compare();
    if (!this.dialog.open) this.dialog.showModal();
  }

  held(on) {
    if (!this.state.other) return;
    this.stage.classList.toggle("held", on);
    this.compare();
  }

  /** Show as much of the other picture as is asked for, and say which is where. */
  compare() {
    const { picture, other } = this.state;
    const share = !other ? 0 : this.stage.classList.contains("held") ? 100 : Number(this.wipe.value);
    this.other.style.clipPath = `inset(0 ${100 - share}% 0 0)`;
    this.label.textContent = share === 0 ? picture.label : share === 100 ? other.label : `left: ${other.label}, right: ${picture.label}`;
  }
}
