/* Changing many captions: find and replace, a word before or after, always with a preview; and figures about them. */
import { api, during, element, toast, whole } from "./app.js";
import { address, at, changed, count, offerUndo } from "./dataset_tools.js";

let planned = null;

/** Show the figures; forms stay as they are. */
export async function showBulk() {
  try {
    at("figures").replaceChildren(...figures(await whole(address("/figures"))));
  } catch (error) {
    at("figures").textContent = error.message;
  }
}

async function preview(edit) {
  const found = await api("POST", address("/bulk/preview"), { edit });
  planned = { edit, token: found.token };
  at("preview").hidden = false;
  at("preview-title").textContent = found.changed ? `${count(found.changed, "caption")} would change` : "Nothing would change";
  const notes = [];
  if (found.changed > found.shown.length) notes.push(`The first ${found.shown.length} are shown.`);
  if (found.unreadable.length) notes.push(`${count(found.unreadable.length, "caption")} cannot be read and would stay: ${found.unreadable.slice(0, 5).join(", ")}.`);
  at("preview-note").textContent = notes.join(" ");
  at("apply").disabled = found.changed === 0;
  at("apply").textContent = `Change ${count(found.changed, "caption")}`;
  at("preview-list").replaceChildren(...found.shown.map(line));
  at("preview").scrollIntoView({ block: "nearest" });
}

function line(change) {
  const [start, gone, come, end] = difference(change.before, change.after);
  return element("li", {}, element("strong", { class: "wrap" }, change.key),
    element("p", {}, start, element("del", {}, gone), end),
    element("p", {}, start, element("ins", {}, come), end));
}

/** What two texts share at their beginnings and ends, and what differs between. */
function difference(before, after) {
  const [a, b] = [[...before], [...after]];
  let first = 0;
  while (first < a.length && first < b.length && a[first] === b[first]) first += 1;
  let last = 0;
  while (last < a.length - first && last < b.length - first && a.at(-1 - last) === b.at(-1 - last)) last += 1;
  const cut = (text) => text.slice(first, text.length - last).join("");
  return [a.slice(0, first).join(""), cut(a), cut(b), last ? a.slice(-last).join("") : ""];
}

function figures(found) {
  const texts = [
    `${count(found.pictures, "picture")}: ${found.missing} without a caption, ${found.empty} with an empty one`
    + (found.unreadable ? `, ${found.unreadable} with one that cannot be read` : ""),
    `Words in a caption: ${found.shortest} to ${found.longest}, half have at most ${found.median}`,
  ];
  const parts = texts.map((text) => element("p", {}, text));
  if (found.lengths.length) parts.push(element("h3", {}, "Lengths in words"), bars(found.lengths.map(([from, many]) => [`${from} to ${from + 9}`, many])));
  if (found.words.length) parts.push(element("h3", {}, "Most common words"), bars(found.words.slice(0, 20)));
  if (found.tags.length) parts.push(element("h3", {}, "Most common tags"), bars(found.tags.slice(0, 20)));
  return parts;
}

function bars(pairs) {
  const most = Math.max(...pairs.map(([, many]) => many), 1);
  const shown = element("div", { class: "bars" });
  for (const [name, many] of pairs) {
    const bar = element("span", { class: "bar", "aria-hidden": "true" });
    bar.style.width = `${(100 * many) / most}%`;
    shown.append(element("span", { class: "wrap" }, name), bar, element("span", {}, String(many)));
  }
  return shown;
}

at("replace-form").addEventListener("submit", (event) => {
  event.preventDefault();
  during(event.submitter, () => preview({
    action: "replace", find: at("find").value, replace: at("replacement").value,
    whole_words: at("whole-words").checked, match_case: at("match-case").checked,
  }));
});
at("add-form").addEventListener("submit", (event) => {
  event.preventDefault();
  during(event.submitter, () => preview({
    action: "add", text: at("word").value, where: at("where").value, separator: at("separator").value,
    skip_present: at("skip-present").checked, make_missing: at("make-missing").checked,
  }));
});
at("apply").addEventListener("click", () => during(at("apply"), async () => {
  at("applying").hidden = false;
  try {
    const done = await api("POST", address("/bulk/apply"), planned);
    at("preview").hidden = true;
    changed();
    if (done.change !== null) offerUndo(`${count(done.changed, "caption")} changed.`, done.change);
    else toast("Nothing was changed.");
  } finally {
    at("applying").hidden = true;
  }
}));
at("preview-close").addEventListener("click", () => {
  at("preview").hidden = true;
});
