/* Curves over steps, drawn by plotly. Colours come from the page's own, and follow its light and dark. */
import { element } from "./app.js";
import { figure } from "./words.js";

/** Resolves to plotly, which comes with a script tag of its own: `<script id="plotly" src="/static/plotly.min.js" defer>`. */
const plotly = new Promise((resolve, reject) => {
  if (window.Plotly) return resolve(window.Plotly);
  const script = document.getElementById("plotly");
  script.addEventListener("load", () => resolve(window.Plotly));
  script.addEventListener("error", () => reject(new Error("The charts' library could not be loaded; reload the page.")));
  return undefined;
});

const probe = element("span", { hidden: true });
document.body.append(probe);

/** A colour of the style sheet as it is now: `--accent`. */
function colour(name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

const charts = new Set();
for (const query of ["(prefers-color-scheme: dark)", "(max-width: 40rem)"]) {
  matchMedia(query).addEventListener("change", () => charts.forEach((chart) => chart.redraw()));
}

/** A chart with its title, its unit and the last value as text. Hidden as long as there is nothing to show. */
export class Chart {
  /**
   * `unit` stands behind values and at the axis, which is called `axis` where there is none. `empty` says why there may be
   * nothing; without it the chart hides itself. `zero` begins the values' axis at 0.
   */
  constructor(parent, { title, unit = "", axis = unit, empty = "", help = "", tall = false, zero = false }) {
    this.title = title;
    this.unit = unit;
    this.axis = axis;
    this.zero = zero;
    this.last = element("span", { class: "quiet" });
    this.plot = element("div", { class: tall ? "plot tall" : "plot", role: "img" });
    this.note = element("p", { class: "quiet" }, empty);
    const heading = element("h3", {}, title, unit ? element("span", { class: "quiet" }, ` (${unit})`) : null);
    this.node = element("figure", { class: "chart" }, element("figcaption", { class: "row" }, heading, this.last),
      help ? element("p", { class: "help" }, help) : null, this.plot, this.note);
    this.hides = !empty;
    this.node.hidden = this.hides;
    this.plot.hidden = true;
    parent.append(this.node);
    charts.add(this);
  }

  /**
   * Draw lines. Each is {name, x, y, colour: "--accent", faint, dash, dots, always}; `always` are not counted when it is
   * asked whether there is anything. `log` draws the values on a logarithmic axis; `named` tells the last value of every
   * line that is not faint, else that of the first.
   */
  async draw(lines, { log = false, named = false } = {}) {
    this.lines = lines;
    this.log = log;
    const there = lines.some((line) => !line.always && line.y.some((value) => value !== null));
    this.node.hidden = !there && this.hides;
    this.plot.hidden = !there;
    this.note.hidden = there;
    if (!there) return;
    const bold = lines.filter((line) => !line.faint && !line.always);
    this.last.textContent = (named ? bold : bold.slice(0, 1)).map((line) => this.lastOf(line, named)).filter(Boolean).join(" · ");
    this.plot.setAttribute("aria-label", `${this.title}: ${this.last.textContent}`);
    await this.redraw();
  }

  /** The last value of a line in words: `A 0.31 s at step 200`. */
  lastOf(line, named) {
    const at = line.y.findLastIndex((value) => value !== null && value !== undefined);
    return at < 0 ? "" : `${named ? `${line.name} ` : ""}${figure(line.y[at])}${this.unit ? ` ${this.unit}` : ""} at step ${line.x[at]}`;
  }

  /** Draw again what there is, in the colours and the width of now. What is not on the screen has no width yet. */
  async redraw() {
    const library = await plotly;
    if (!this.lines || !this.plot.offsetParent) return; // asked after the wait: its tab may have been left meanwhile
    await library.react(this.plot, this.lines.map((line) => trace(line, this.unit)), layout(this), CONFIG);
    if (this.width !== this.plot.clientWidth) library.Plots.resize(this.plot);
    this.width = this.plot.clientWidth;
  }
}

const TOUCH = matchMedia("(pointer: coarse)").matches; // a finger on a chart scrolls the page
const CONFIG = {
  responsive: true, displaylogo: false, displayModeBar: TOUCH ? false : "hover",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
};

function trace(line, unit) {
  return {
    type: "scatter", name: line.name, x: line.x, y: line.y, mode: line.dots ? "lines+markers" : "lines",
    line: { color: colour(line.colour ?? "--accent"), width: line.faint ? 1 : 2, dash: line.dash ?? "solid" },
    marker: { size: 6 }, opacity: line.faint ? 0.35 : 1, connectgaps: false,
    hovertemplate: `%{y:.4g}${unit ? ` ${unit}` : ""}<extra>%{fullData.name}</extra>`,
  };
}

function layout(chart) {
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
  return {
    font: { color: colour("--text"), size: 12 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 10, r: 10, t: 8, b: 10 }, hovermode: "x unified", dragmode: TOUCH ? false : "zoom",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--quiet"), activecolor: colour("--accent") },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") } },
    xaxis: { ...axis, title: { text: "step" }, rangemode: "tozero" },
    yaxis: { ...axis, title: { text: chart.axis }, type: chart.log ? "log" : "linear", rangemode: chart.zero ? "tozero" : "normal", exponentformat: "e" },
    showlegend: chart.lines.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
    uirevision: `${chart.title} ${chart.log}`, // what was zoomed into stays while values come in
  };
}

/**
 * Exponential mean of values at steps, with a memory of `half` steps: what is so many steps older counts half.
 * It starts at the weight of its first value instead of zero (as Adam's means do), and leaves out what is not finite.
 */
export function smoothed(steps, values, half) {
  if (!half) return values;
  let [sum, weight, before] = [0, 0, steps[0] - ((steps[1] ?? steps[0] + 1) - steps[0])];
  return values.map((value, at) => {
    if (value === null) return weight ? sum / weight : null;
    const kept = 0.5 ** ((steps[at] - before) / half);
    before = steps[at];
    sum = kept * sum + (1 - kept) * value;
    weight = kept * weight + (1 - kept);
    return sum / weight;
  });
}
