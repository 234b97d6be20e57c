/* The overview of a job: its curves, as they come. */
import { api } from "./app.js";
import { Chart, smoothed } from "./chart.js";

const at = (id) => document.getElementById(id);
const MEMORIES = [0, 2, 5, 10, 20, 50, 100, 200, 500, 1000]; // steps, by the slider's place
const MOST = 6000; // points that are kept before the whole is asked for again, thinned

/** The half of the smoothing's memory in steps that a slider stands for, said beside it. */
export function memory(slider, shown) {
  const half = MEMORIES[Number(slider.value)];
  shown.textContent = half ? `half-life ${half} steps` : "none";
  slider.setAttribute("aria-valuetext", shown.textContent);
  return half;
}

/** Put the points of an answer behind those that are there. */
export function joined(before, more) {
  if (before === null || more.reset) return more;
  const append = (one, other) => Object.fromEntries(Object.keys(one).map((name) => [name, one[name].concat(other[name])]));
  const times = new Set([...Object.keys(before.validation.by_time), ...Object.keys(more.validation.by_time)]);
  const nothing = (part) => part.validation.step.map(() => null);
  const byTime = Object.fromEntries([...times].map((time) => [time,
    (before.validation.by_time[time] ?? nothing(before)).concat(more.validation.by_time[time] ?? nothing(more))]));
  const plain = ({ step, loss }) => ({ step, loss });
  return {
    ...more, steps: append(before.steps, more.steps), drift: append(before.drift, more.drift),
    validation: { ...append(plain(before.validation), plain(more.validation)), by_time: byTime },
  };
}

/** All curves of a job, asked for until everything is read; `found` is what is there already. */
export async function curves(root, process, found, each = () => {}) {
  const kept = found && found.steps.step.length <= MOST ? found : null;
  let all = kept;
  do {
    const words = new URLSearchParams(all ? { since: all.cursor } : {});
    if (process) words.set("process", process);
    all = joined(all, await api("GET", `${root}/curves?${words}`));
    each(all);
  } while (!all.complete);
  return all.steps.step.length > MOST ? curves(root, process, null, each) : all; // read in many pieces: thinned as one
}

export class Overview {
  constructor(root) {
    this.root = root;
    this.found = null;
    this.process = null;
    const small = at("charts");
    this.loss = new Chart(at("loss-chart"), { title: "Loss", axis: "loss", tall: true, empty: "No steps yet. Curves appear with the first step; captions and pictures are prepared before." });
    this.validation = new Chart(small, { title: "Validation loss", axis: "loss", help: "On pictures that are not trained on, always at the same noise and times." });
    this.bands = new Chart(small, { title: "Loss by time", axis: "loss", help: "0 is the clean picture, 1 is noise. Means over stretches of steps." });
    this.drift = new Chart(small, { title: "Drift", unit: "relative", help: "How far few-step pictures of prompts that nobody trains have moved; 0 is unmoved." });
    this.lr = new Chart(small, { title: "Learning rate", axis: "learning rate", zero: true });
    this.norm = new Chart(small, { title: "Gradient norm", axis: "norm" });
    this.speed = new Chart(small, { title: "Time of a step", unit: "s", zero: true });
    this.memory = new Chart(small, { title: "Memory", unit: "GiB", zero: true, help: "The most that was held so far: on the card, or by the process where there is none." });
    at("smoothing").addEventListener("input", () => this.draw());
    at("log-scale").addEventListener("change", () => this.draw());
    at("process").addEventListener("change", () => {
      this.process = Number(at("process").value);
      this.found = null;
      this.refresh();
    });
  }

  /** Curves that came while another tab was shown. */
  shown() {
    this.draw();
  }

  async refresh() {
    try {
      this.found = await curves(this.root, this.process, this.found, (all) => (at("reading").hidden = all.complete));
    } finally {
      at("reading").hidden = true;
    }
    if (this.found.processes > 1 && at("process-choice").hidden) {
      at("process-choice").hidden = false;
      at("process").replaceChildren(...Array.from({ length: this.found.processes }, (_, place) => new Option(place + 1, place + 1)));
      at("process").value = this.found.process;
    }
    await this.draw();
  }

  async draw() {
    const half = memory(at("smoothing"), at("smoothing-shown"));
    if (!this.found) return;
    const { steps, validation, bands, drift } = this.found;
    const x = steps.step;
    const log = at("log-scale").checked;
    const seconds = { name: "step", x, y: smoothed(x, steps.seconds, half) };
    await Promise.all([
      this.loss.draw(lossLines(steps, half), { log }),
      this.validation.draw(validationLines(validation), { log }),
      this.bands.draw(bands ? bandLines(bands) : [], { log }),
      this.drift.draw(driftLines(drift)),
      this.lr.draw([{ name: "learning rate", x, y: steps.lr }]),
      this.norm.draw([
        { name: "norm", x, y: steps.grad_norm, faint: half > 0 },
        ...(half ? [{ name: "smoothed", x, y: smoothed(x, steps.grad_norm, half) }] : []),
      ], { log }),
      this.speed.draw([seconds, { name: "between steps", x, y: smoothed(x, steps.seconds_outside, half), colour: "--warn" }]),
      this.memory.draw([{ name: "memory", x, y: steps.memory_bytes.map((value) => (value === null ? null : value / 2 ** 30)) }]),
    ]);
  }
}

/** The loss of single steps, faint, and its mean. Means are made of all steps, those between two points included. */
export function lossLines(steps, half, colour = "--accent", name = "loss") {
  const raw = { name: half ? `${name} of a step` : name, x: steps.step, y: steps.loss, faint: half > 0, colour };
  return half ? [raw, { name: half ? `${name}, smoothed` : name, x: steps.step, y: smoothed(steps.step, steps.loss_mean, half), colour }] : [raw];
}

const COLOURS = ["--accent", "--warn", "--bad", "--quiet"];

function validationLines({ step, loss, by_time: byTime }) {
  const times = Object.entries(byTime).sort(([a], [b]) => Number(a) - Number(b));
  return [{ name: "mean", x: step, y: loss, dots: true, colour: "--text" },
    ...times.map(([time, y], at) => ({ name: `at ${time}`, x: step, y, dots: true, dash: "dot", faint: false, colour: COLOURS[at % COLOURS.length] }))];
}

function bandLines({ edges, step, loss }) {
  return loss.map((y, band) => ({ name: `${edges[band]} to ${edges[band + 1]}`, x: step, y, colour: COLOURS[band % COLOURS.length] }));
}

function driftLines(drift) {
  const lines = [{ name: "drift", x: drift.step, y: drift.drift, dots: true }];
  const more = [["few against many steps", "gap", "--warn"], ["the same, untouched", "gap_untouched", "--quiet"], ["variety", "spread", "--bad"]];
  for (const [name, key, colour] of more) {
    if (drift[key].some((value) => value !== null)) lines.push({ name, x: drift.step, y: drift[key], dots: true, dash: "dot", colour });
  }
  return lines;
}
