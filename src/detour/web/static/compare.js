/* Two jobs side by side: options that differ, curves over each other, previews by prompt and step. */
import { api, element, whole } from "./app.js";
import { Chart, smoothed } from "./chart.js";
import { curves, lossLines, memory } from "./job_curves.js";
import { pictures, Scrubber, Viewer } from "./matrix.js";

const at = (id) => document.getElementById(id);
const words = new URLSearchParams(location.search);
const chosen = { a: words.get("a") ?? "", b: words.get("b") ?? "" };
const COLOUR = { a: "--accent", b: "--warn" };
const SIDES = ["a", "b"];

/** The jobs to choose from: the last 200, and those in the address. */
async function choices() {
  const found = await api("GET", "/api/jobs?limit=200");
  const jobs = new Map(found.jobs.map((job) => [String(job.id), job.name]));
  for (const side of SIDES) {
    if (chosen[side] && !jobs.has(chosen[side])) jobs.set(chosen[side], "");
    const options = [...jobs].map(([number, name]) => new Option(`#${number} ${name}`, number, false, number === chosen[side]));
    at(side).replaceChildren(new Option("choose …", ""), ...options);
    at(side).value = chosen[side];
    at(side).addEventListener("change", () => at("a").value && at("b").value && at("choose").submit());
  }
  at("swap").addEventListener("click", () => {
    [at("a").value, at("b").value] = [at("b").value, at("a").value];
    at("choose").submit();
  });
  at("nothing").hidden = jobs.size > 1;
}

// --- options ----------------------------------------------------------------------------------------------------------

async function options() {
  const found = await api("GET", `/api/compare?a=${encodeURIComponent(chosen.a)}&b=${encodeURIComponent(chosen.b)}`);
  for (const side of SIDES) at(`name-${side}`).textContent = `${found[side].name} #${found[side].id}`;
  at("same").hidden = found.differences.length > 0 || Boolean(found.trouble);
  at("differences").hidden = found.differences.length === 0;
  at("no-texts").hidden = !found.trouble;
  at("no-texts").textContent = found.trouble;
  const value = (text) => (text === null ? element("span", { class: "quiet" }, "not set") : element("div", { class: "value" }, text));
  at("differences").tBodies[0].replaceChildren(...found.differences.map(({ option, a, b }) =>
    element("tr", {}, element("td", {}, option), element("td", {}, value(a)), element("td", {}, value(b)))));
}

// --- curves -----------------------------------------------------------------------------------------------------------

const CHARTS = [
  [{ title: "Validation loss", axis: "loss" }, (one) => [one.validation.step, one.validation.loss], { dots: true }],
  [{ title: "Drift", unit: "relative" }, (one) => [one.drift.step, one.drift.drift], { dots: true }],
  [{ title: "Learning rate", axis: "learning rate", zero: true }, (one) => [one.steps.step, one.steps.lr], {}],
  [{ title: "Gradient norm", axis: "norm" }, (one, half) => [one.steps.step, smoothed(one.steps.step, one.steps.grad_norm, half)], {}],
  [{ title: "Time of a step", unit: "s", zero: true }, (one, half) => [one.steps.step, smoothed(one.steps.step, one.steps.seconds, half)], {}],
  [{ title: "Memory", unit: "GiB", zero: true }, (one) => [one.steps.step, one.steps.memory_bytes.map((value) => (value === null ? null : value / 2 ** 30))], {}],
];

async function drawCurves() {
  const loss = new Chart(at("loss-chart"), { title: "Loss", axis: "loss", tall: true, empty: "Neither has done a step yet." });
  const charts = CHARTS.map(([about]) => new Chart(at("charts"), about));
  const found = {};
  for (const side of SIDES) found[side] = await curves(`/api/jobs/${chosen[side]}`, null, null);
  const draw = () => {
    const half = memory(at("smoothing"), at("smoothing-shown"));
    const log = at("log-scale").checked;
    loss.draw(SIDES.flatMap((side) => lossLines(found[side].steps, half, COLOUR[side], side.toUpperCase())), { log, named: true });
    CHARTS.forEach(([, of, style], place) => charts[place].draw(SIDES.map((side) => {
      const [x, y] = of(found[side], half);
      return { name: side.toUpperCase(), x, y, colour: COLOUR[side], ...style };
    }), { log: log && place < 1, named: true }));
  };
  at("smoothing").addEventListener("input", draw);
  at("log-scale").addEventListener("change", draw);
  draw();
}

// --- previews ---------------------------------------------------------------------------------------------------------

/** The step of a prompt's picture to show at a step: of that step, else the last before it. */
function nearest(source, index, step) {
  return source.steps.filter((one) => one <= step && source.has(one, index)).at(-1) ?? null;
}

async function drawSamples() {
  const source = {};
  for (const side of SIDES) source[side] = pictures(Number(chosen[side]), await whole(`/api/jobs/${chosen[side]}/samples`));
  const steps = [...new Set(SIDES.flatMap((side) => source[side].steps))].sort((one, other) => one - other);
  at("no-samples").hidden = steps.length > 0;
  at("sample-view").hidden = steps.length === 0;
  if (!steps.length) return;
  const rows = matched(source);
  const viewer = new Viewer();
  const scrubber = new Scrubber(at("scrubber-row"), (step) => {
    at("previews").replaceChildren(...rows.map((row) => pair(source, row, step, viewer, scrubber)));
  });
  scrubber.set(steps);
}

/** Rows: prompts that both have, then those of one alone. Prompts without a text go by their place. */
function matched(source) {
  const key = (row) => row.prompt ?? `prompt ${row.index + 1}`;
  const rows = new Map();
  for (const side of SIDES) {
    for (const row of source[side].samples.prompts) {
      let name = key(row);
      while (rows.get(name)?.[side] !== undefined) name += " "; // the same prompt twice in a job
      rows.set(name, { prompt: key(row), ...rows.get(name), [side]: row.index });
    }
  }
  return [...rows.values()].sort((one, other) => (one.a === undefined) - (other.a === undefined) || (one.b === undefined) - (other.b === undefined));
}

function pair(source, row, step, viewer, scrubber) {
  const found = Object.fromEntries(SIDES.map((side) => [side, row[side] === undefined ? null : nearest(source[side], row[side], step)]));
  const label = (side) => `${side.toUpperCase()}, step ${found[side]}`;
  const layer = (side) => (found[side] === null ? null : { address: source[side].whole(found[side], row[side]), label: label(side) });
  const open = () => viewer.show({
    title: `Step ${step}`, text: row.prompt, picture: layer("b") ?? layer("a"), other: layer("a") && layer("b") ? layer("a") : null,
    up: null, down: null, ...moves(step, scrubber, row),
  });
  const one = (side) => {
    const mark = element("span", { class: `mark ${side}` }, side.toUpperCase());
    if (found[side] === null) return element("figure", {}, element("div", { class: "missing quiet" }, "no picture"), element("figcaption", {}, mark));
    const picture = element("img", { src: source[side].small(found[side], row[side]), alt: row.prompt, loading: "lazy" });
    return element("figure", {}, element("button", { type: "button", class: "picture", "aria-label": `Enlarge ${label(side)}: ${row.prompt}`, onclick: open }, picture),
      element("figcaption", {}, mark, ` step ${found[side]}`));
  };
  row.open = open;
  return element("figure", {}, element("div", { class: "pair" }, one("a"), one("b")), element("figcaption", {}, row.prompt));
}

/** In the viewer, left and right go through the steps. */
function moves(step, scrubber, row) {
  const place = scrubber.steps.indexOf(step);
  const to = (where) => (where in scrubber.steps ? () => {
    scrubber.go(scrubber.steps[where]);
    row.open();
  } : null);
  return { left: to(place - 1), right: to(place + 1) };
}

async function main() {
  try {
    await choices();
    if (chosen.a && chosen.b) {
      at("found").hidden = false;
      await options();
      await drawCurves();
      await drawSamples();
    }
  } catch (error) {
    at("trouble").hidden = false;
    at("trouble").textContent = error.message;
  } finally {
    at("loading").hidden = true;
  }
}

main();
