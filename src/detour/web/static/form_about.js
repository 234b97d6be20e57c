/* What the form's page says before anything is typed: the models, and the job that it is about. */

import { element } from "./app.js";

const at = (id) => document.getElementById(id);

/** The models to choose from. */
export function showPresets(presets) {
  const named = (test) => presets.filter(test).map((one) => element("option", { value: one.name }, one.title));
  at("preset").replaceChildren(
    element("option", { value: "", disabled: true }, "Not one of these (see the YAML)"),
    element("optgroup", { label: "Few steps, kept by a training adapter" }, ...named((one) => one.adapter)),
    element("optgroup", { label: "Few steps, without a known training adapter" }, ...named((one) => one.distilled && !one.adapter)),
    element("optgroup", { label: "Ordinary models" }, ...named((one) => !one.distilled)),
  );
}

/** The job that is edited or copied: what the page is called, and what its buttons do. */
export function showJob(start) {
  const job = start.edit ?? start.copy_of;
  if (!job) return;
  at("about").hidden = false;
  if (!start.edit) {
    at("about").textContent = `A copy of job ${job.id}, ${job.name}.`;
    return;
  }
  at("title").textContent = `Job ${job.id}: ${job.name}`;
  document.title = `Edit job ${job.id} · Detour`;
  at("about").textContent = job.locked
    ? `This job is ${job.state}: its file can be saved once it has ended.`
    : "Saving replaces the job's file. What it has trained stays.";
  at("finish-title").textContent = "Save it";
  at("draft").textContent = "Save";
  at("queue").textContent = job.state === "queued" ? "Save; it stays in the queue" : "Save and add to the queue";
  at("draft").hidden = job.state === "queued";
  at("queue").disabled = at("draft").disabled = job.locked;
}
