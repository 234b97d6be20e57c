/* Questions in a dialog, and everything that a job can be asked to do: shared by the list and the job's own page. */
import { api, element, toast } from "./app.js";

/** Ask before something that cannot be taken back. Resolves to true or false; with `input`, to its value or null. */
export function ask({ title, text, action, danger = false, input = null }) {
  return new Promise((resolve) => {
    const yes = element("button", { class: danger ? "danger" : "primary", value: "yes" }, action);
    const no = element("button", { value: "no", formnovalidate: true }, "Cancel");
    const field = input
      ? element("p", {}, element("label", { for: "ask-input" }, input.label), element("br"),
          element("input", { id: "ask-input", type: "number", required: true, ...input.attributes }),
          input.help ? element("p", { class: "help" }, input.help) : null)
      : null;
    const form = element("form", { method: "dialog" }, element("h2", { id: "ask-title" }, title),
      element("p", {}, text), field, element("p", { class: "row" }, yes, no));
    const dialog = element("dialog", { "aria-labelledby": "ask-title" }, form);
    dialog.addEventListener("close", () => {
      const agreed = dialog.returnValue === "yes";
      const value = input ? Number(form.querySelector("input").value) : true;
      dialog.remove();
      resolve(agreed ? value : input ? null : false);
    });
    document.body.append(dialog);
    dialog.showModal();
    (danger ? no : (form.querySelector("input") ?? yes)).focus();
  });
}

/** Do something with a job and say what came of it. Returns the answer, or undefined where the user thought better. */
export async function act(job, what) {
  const root = `/api/jobs/${job.id}`;
  const answer = await ACTIONS[what](job, root);
  if (answer?.note) toast(answer.note);
  return answer;
}

const ACTIONS = {
  start: (job, root) => api("POST", `${root}/start`),
  stop: (job, root) => api("POST", `${root}/stop`, {}),
  save: (job, root) => api("POST", `${root}/save`),
  sample: (job, root) => api("POST", `${root}/sample`),
  clone: (job, root) => api("POST", `${root}/clone`),
  async kill(job, root) {
    const sure = await ask({
      title: `Kill job ${job.id}?`, action: "Kill it", danger: true,
      text: "It ends whatever it is doing, without saving. What was saved before is intact.",
    });
    return sure ? api("POST", `${root}/stop`, { kill: true }) : undefined;
  },
  async delete(job, root) {
    const sure = await ask({
      title: `Delete job ${job.id} (${job.name})?`, action: "Delete", danger: true,
      text: "The job and its logs go. What it has trained stays on the disk.",
    });
    return sure ? api("DELETE", root) : undefined;
  },
  async extend(job, root) {
    const steps = await ask({
      title: "Continue for more steps", action: "Continue",
      text: "Raises train.steps in the job file and starts the job again: it goes on from its last checkpoint.",
      input: {
        label: "Steps more", attributes: { min: 1, max: 10_000_000, step: 1, value: 500 },
        help: "A learning rate that falls towards the end (linear, cosine) is worked out anew for the longer run.",
      },
    });
    return steps ? api("POST", `${root}/extend`, { steps }) : undefined;
  },
};
