/* The health report: made in the background, shown with what to do about each finding. */
import { api, during, element } from "./app.js";
import { openViewer } from "./dataset_pictures.js";
import { address, at, count, thumbnail } from "./dataset_tools.js";
import { moment } from "./words.js";

const NAMES = { stop: "Stops a run", warning: "Warning", note: "Note" };
const EVERY = 700; // ms between two looks at how far it is
const SHOWN = 40; // instances of a finding on the page

let asked = 0;

/** Have the report made, unless it is being made, and follow it. Pictures that are known take no time. */
export async function showHealth() {
  await follow("POST");
}

/** Ask how far the report is until it is made; `then` is called with it. */
export async function follow(method, then = show) {
  const mine = ++asked;
  try {
    let report = await api(method, address("/health"));
    while (mine === asked) {
      progress(report);
      if (report.state !== "running") {
        then(report);
        return;
      }
      await new Promise((resolve) => setTimeout(resolve, EVERY));
      report = await api("GET", address("/health"));
    }
  } catch (error) {
    at("health-running").hidden = true;
    at("health-problem").hidden = false;
    at("health-problem").textContent = error.message;
  }
}

function progress(report) {
  const running = report.state === "running";
  at("health-running").hidden = !running;
  if (report.total) {
    at("health-bar").max = report.total;
    at("health-bar").value = report.done;
  } else {
    at("health-bar").removeAttribute("value");
  }
  at("health-progress").textContent = `Looking at pictures: ${report.done} of ${report.total}`;
}

async function show(report) {
  at("health-problem").hidden = report.state !== "failed";
  at("health-problem").textContent = report.problem;
  at("health-good").hidden = report.state !== "done" || report.findings.length > 0;
  at("findings").replaceChildren(...report.findings.map(finding));
  const details = await api("GET", address(""));
  const model = [...at("arch").options].find((option) => option.value === details.settings.arch) ?? at("arch").selectedOptions[0];
  at("health-for").textContent = `${count(report.pictures, "picture")} at ${moment(report.at)}, for ${model?.textContent} at resolution ${details.settings.resolution}`
    + (details.settings.trigger_word ? `, trigger word “${details.settings.trigger_word}”` : "");
}

function finding(found) {
  const shown = found.items.slice(0, SHOWN);
  const rest = found.count - shown.length;
  return element("details", { class: "card finding", "data-kind": found.kind, open: found.severity !== "note" },
    element("summary", {}, element("span", { class: `state ${found.severity}` }, NAMES[found.severity]), `${found.count} × ${found.title}`),
    element("p", {}, `Why it matters: ${found.why}.`),
    element("p", {}, `What to do: ${found.advice}.`),
    element("div", { class: "strip" }, ...shown.map((item) => instance(item))),
    rest > 0 ? element("p", { class: "quiet" }, `and ${rest} more`) : null);
}

function instance(item) {
  const pictures = item.keys.map((key) => ({ key, text: () => item.note }));
  const images = item.keys.slice(0, 12).map((key, place) => (
    thumbnail(key, address("thumbnails", key), () => openViewer(pictures, place))));
  const words = [item.keys.slice(0, 12).join(" = "), item.note].filter(Boolean);
  return element("figure", { class: item.keys.length > 1 ? "group" : "" },
    element("div", { class: "row" }, ...images),
    element("figcaption", {}, ...words.map((text) => element("div", {}, text))));
}

at("check-again").addEventListener("click", () => during(at("check-again"), showHealth));
