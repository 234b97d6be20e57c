/* The previews of a job: one step at a time, and all steps in a matrix. */
import { element, whole } from "./app.js";
import { matrix, pictures, Scrubber, Viewer } from "./matrix.js";

const at = (id) => document.getElementById(id);

export class Samples {
  constructor(job) {
    this.job = job;
    this.source = null;
    this.drawn = "";
    this.figures = new Map(); // by prompt: its picture and text, changed in place while somebody scrubs
    this.viewer = new Viewer();
    this.scrubber = new Scrubber(at("scrubber-row"), (step) => this.showStep(step));
    at("all-steps").addEventListener("change", () => this.drawMatrix());
    const hold = (on) => () => this.compare(on);
    at("hold").addEventListener("pointerdown", hold(true));
    for (const name of ["pointerup", "pointerleave", "pointercancel", "blur"]) at("hold").addEventListener(name, hold(false));
    at("hold").addEventListener("keydown", (event) => {
      if (event.key !== " " && event.key !== "Enter") return;
      event.preventDefault();
      this.compare(true);
    });
    at("hold").addEventListener("keyup", hold(false));
  }

  /** A step in the address: #samples/250. */
  shown([step]) {
    this.wanted = step === undefined ? null : Number(step);
    if (this.source?.steps.length && this.wanted !== null) this.scrubber.go(this.wanted);
  }

  async refresh() {
    const found = await whole(`/api/jobs/${this.job}/samples`);
    const text = JSON.stringify(found);
    if (text !== this.drawn) {
      this.drawn = text;
      this.source = pictures(this.job, found);
      at("no-samples").hidden = found.steps.length > 0;
      at("sample-view").hidden = found.steps.length === 0;
      this.drawGate(found);
      this.drawFigures();
      this.drawMatrix();
      this.scrubber.set(this.source.steps);
    }
    if (this.wanted !== null && this.source.steps.length) this.scrubber.go(this.wanted);
    this.wanted = null;
  }

  /** What the teacher gate found, if the run had one. */
  drawGate({ gate, process }) {
    at("gate").hidden = !gate;
    if (!gate) return;
    const address = `/api/jobs/${this.job}/samples/${process}/teacher-gate?v=${gate.version}`;
    at("gate-about").textContent = gate.about;
    at("gate-says").textContent = gate.says;
    at("gate-says").className = `state ${gate.passed ? "finished" : "stopped"}`;
    at("gate-reasons").replaceChildren(...gate.reasons.map((reason) => element("li", {}, reason)));
    at("gate-figures").replaceChildren(...gate.figures.flatMap(([label, value]) => [element("dt", {}, label), element("dd", {}, value)]));
    at("gate-drawings").replaceChildren(gate.version === null
      ? element("p", { class: "quiet" }, "The drawings are gone.")
      : element("img", { src: address, alt: "By row a training picture, the drawing told its caption, and the drawing told more" }));
  }

  drawFigures() {
    this.figures.clear();
    at("previews").replaceChildren(...this.source.samples.prompts.map(({ index, prompt, seed }) => {
      const picture = element("img", { alt: "" });
      const open = element("button", { type: "button", class: "picture", onclick: () => this.open(this.scrubber.step, index) }, picture);
      const text = element("span", {}, prompt ?? `prompt ${index + 1}`);
      const label = element("span", { class: "quiet" });
      this.figures.set(index, { picture, open, text, label });
      return element("figure", {}, open, element("figcaption", {}, text, element("br"), label, seed === null ? "" : element("span", { class: "quiet" }, ` · seed ${seed}`)));
    }));
    const comparable = this.source.samples.untouched.length > 0;
    at("hold").hidden = !comparable;
    at("hold-note").textContent = comparable ? "Step 0 is the untouched model." : "No pictures of the untouched model: the run drew none before its first step, began with a LoRA, or has other prompts since.";
  }

  drawMatrix() {
    if (!this.source) return;
    at("all-steps-row").hidden = this.source.steps.length <= 12;
    at("matrix").replaceChildren(matrix(this.source, { all: at("all-steps").checked, onopen: (step, index) => this.open(step, index) }));
  }

  showStep(step) {
    for (const [index, { picture, open, text, label }] of this.figures) {
      const there = this.source.has(step, index);
      open.disabled = !there;
      open.setAttribute("aria-label", `Enlarge prompt ${index + 1} at step ${step}`);
      label.textContent = there ? `step ${step}` : `no picture at step ${step}`;
      text.textContent = this.source.prompt(step, index) || `prompt ${index + 1}`;
      if (there) picture.src = this.source.small(step, index);
      else picture.removeAttribute("src");
      picture.alt = there ? text.textContent : "";
    }
    if (location.hash.startsWith("#samples")) history.replaceState(null, "", `#samples/${step}`);
  }

  /** Show the untouched model's pictures as long as the button is held. */
  compare(on) {
    at("hold").setAttribute("aria-pressed", String(on));
    for (const index of this.source.samples.untouched) {
      const { picture, label } = this.figures.get(index);
      const step = on ? 0 : this.scrubber.step;
      if (!this.source.has(step, index)) continue;
      picture.src = this.source.small(step, index);
      label.textContent = on ? "untouched model" : `step ${step}`;
    }
  }

  open(step, index) {
    const { source } = this;
    const steps = source.steps.filter((one) => source.has(one, index));
    const place = steps.indexOf(step);
    const rows = source.samples.prompts.map((row) => row.index).filter((one) => source.has(step, one));
    const row = rows.indexOf(index);
    const to = (list, where, make) => (where in list ? () => make(list[where]) : null);
    const untouched = step !== 0 && source.samples.untouched.includes(index);
    this.viewer.show({
      title: `Step ${step}`,
      text: source.prompt(step, index) + (source.seed(index) === null ? "" : ` (seed ${source.seed(index)})`),
      picture: { address: source.whole(step, index), label: `step ${step}` },
      other: untouched ? { address: source.whole(0, index), label: "untouched model" } : null,
      left: to(steps, place - 1, (one) => this.open(one, index)),
      right: to(steps, place + 1, (one) => this.open(one, index)),
      up: to(rows, row - 1, (one) => this.open(step, one)),
      down: to(rows, row + 1, (one) => this.open(step, one)),
    });
  }
}
