/* The pictures of a dataset, a page at a time, each with its caption, which saves itself. */
import { api, during, element, toast, whole } from "./app.js";
import { address, at, changed, count, offerUndo, thumbnail } from "./dataset_tools.js";

const PER_PAGE = 60;
const PAUSE = 800; // ms without a key after which a caption is saved
const WORDS = {
  saved: "Saved", waiting: "Not saved yet", saving: "Saving …", missing: "No caption", still: "",
};

let offset = 0;
let total = 0;
let cards = [];
let asked = 0;
let made = 0;

/** A caption on the page: what is typed, and the version of the file that it stands for. */
class Caption {
  constructor(picture) {
    this.key = picture.key;
    this.version = picture.version;
    this.saved = picture.text ?? "";
    this.area = element("textarea", { id: `caption-${++made}`, "aria-label": `Caption of ${picture.key}`, spellcheck: "true" });
    this.area.value = this.saved;
    this.saved = this.area.value; // line ends as the browser has them
    this.state = element("span", { class: "saving", role: "status" });
    this.choice = element("span", { class: "row" });
    if (picture.problem) this.say("failed", `The caption file ${picture.problem}. What you type replaces it.`);
    else this.say(picture.version === "none" ? "missing" : "still");
    this.area.addEventListener("input", () => this.typed());
    this.area.addEventListener("blur", () => this.save());
  }

  say(state, text = WORDS[state]) {
    this.state.dataset.state = state;
    this.state.textContent = text;
    if (state !== "conflict") this.choice.replaceChildren();
  }

  get dirty() {
    return this.area.value !== this.saved;
  }

  typed() {
    clearTimeout(this.timer);
    if (!this.dirty) return this.say("saved");
    if (this.state.dataset.state !== "conflict") this.say("waiting");
    this.timer = setTimeout(() => this.save(), PAUSE);
    return undefined;
  }

  /** Save what is typed, one request after the other. */
  async save() {
    clearTimeout(this.timer);
    if (!this.dirty || this.state.dataset.state === "conflict") return;
    this.running = (this.running ?? Promise.resolve()).then(() => this.send());
    await this.running;
  }

  async send() {
    const text = this.area.value;
    if (text === this.saved || this.state.dataset.state === "conflict") return;
    this.say("saving");
    try {
      const answer = await api("PUT", address("captions", this.key), { text, version: this.version });
      this.version = answer.version;
      this.saved = text;
      this.say(this.dirty ? "waiting" : "saved");
    } catch (error) {
      if (error.status === 409) await this.conflict(error);
      else this.say("failed", `Not saved: ${error.message}`);
    }
  }

  /** The file was changed by somebody else: show both, and let the person choose. */
  async conflict(error) {
    const there = await api("GET", address("captions", this.key)).catch(() => null);
    if (!there || there.version === this.version) {
      this.say("failed", `Not saved: ${error.message}`);
      return;
    }
    this.say("conflict", `Changed on the disk meanwhile: ${there.text ?? "(no caption)"}`);
    const mine = element("button", { type: "button", class: "small" }, "Keep mine");
    const theirs = element("button", { type: "button", class: "small" }, "Take that");
    mine.addEventListener("click", () => {
      this.version = there.version;
      this.say("waiting");
      this.save();
    });
    theirs.addEventListener("click", () => {
      this.version = there.version;
      this.area.value = there.text ?? "";
      this.saved = this.area.value;
      this.say("still");
    });
    this.choice.replaceChildren(mine, theirs);
  }
}

/** Save every caption on the page that is not saved. */
export async function saveAll() {
  await Promise.all(cards.map((card) => card.caption.save()));
}

/** Read this page of pictures and show it. */
export async function showPictures() {
  const mine = ++asked;
  await saveAll();
  const query = { offset, limit: PER_PAGE, q: at("search").value.trim(), only: at("uncaptioned").checked ? "uncaptioned" : "all" };
  const found = await whole(address("/pictures", null, query)).catch((error) => toast(error.message, "error"));
  if (!found || mine !== asked) return;
  total = found.total;
  if (offset >= total && offset > 0) {
    offset = Math.max(0, Math.floor((total - 1) / PER_PAGE) * PER_PAGE);
    await showPictures();
    return;
  }
  const searched = query.q !== "" || query.only !== "all";
  at("no-pictures").hidden = total > 0 || searched;
  at("no-match").hidden = total > 0 || !searched;
  cards = found.pictures.map(card);
  at("cards").replaceChildren(...cards.map((one) => one.shown));
  at("pager").hidden = total <= PER_PAGE;
  at("page-of").textContent = `${offset + 1} to ${offset + cards.length} of ${total}`;
  at("page-back").disabled = offset === 0;
  at("page-on").disabled = offset + PER_PAGE >= total;
  showSelected();
}

function card(picture) {
  const caption = new Caption(picture);
  const box = element("input", { type: "checkbox", "aria-label": `Select ${picture.key}` });
  box.addEventListener("change", showSelected);
  const remove = element("button", { type: "button", class: "small", "aria-label": `Remove ${picture.key}` }, "Remove");
  remove.addEventListener("click", () => during(remove, () => removePictures([picture.key])));
  const found = { picture, caption, box };
  const image = thumbnail(picture.key, address("thumbnails", picture.key, { v: picture.v }), () => view(cards.indexOf(found)));
  found.shown = element("li", { class: "picture card", "data-key": picture.key }, image,
    element("div", { class: "words" },
      element("label", { class: "name", for: caption.area.id }, picture.key), caption.area,
      element("div", { class: "row" }, caption.state, caption.choice),
      element("div", { class: "row" }, element("label", { class: "row grow" }, box, "Select"), remove)));
  caption.area.addEventListener("keydown", (event) => {
    const on = event.key === "PageDown" || (event.altKey && event.key === "ArrowDown");
    const back = event.key === "PageUp" || (event.altKey && event.key === "ArrowUp");
    if (!on && !back) return;
    event.preventDefault();
    go(cards.indexOf(found) + (on ? 1 : -1));
  });
  return found;
}

/** Edit the caption at a place on this page; beyond its ends, on the next or previous page. */
async function go(place) {
  if (place < 0 && offset > 0) {
    offset -= PER_PAGE;
    await showPictures();
    place = cards.length - 1;
  } else if (place >= cards.length && offset + PER_PAGE < total) {
    offset += PER_PAGE;
    await showPictures();
    place = 0;
  }
  const found = cards[Math.min(Math.max(place, 0), cards.length - 1)];
  found?.caption.area.focus();
  found?.shown.scrollIntoView({ block: "nearest" });
}

function showSelected() {
  const chosen = cards.filter((one) => one.box.checked).length;
  at("selected").hidden = chosen === 0;
  at("selected-count").textContent = `${chosen} selected`;
}

async function removePictures(keys) {
  await saveAll();
  const done = await api("POST", address("/remove"), { keys });
  changed();
  offerUndo(`${count(done.changed, "picture")} removed, with captions.`, done.change);
}

// --- one picture, large ---------------------------------------------------------------------------------------------

let viewed = [];
let place = 0;

function view(index) {
  openViewer(cards.map((one) => ({ key: one.picture.key, v: one.picture.v, text: () => one.caption.area.value })), index);
}

/** Show pictures large, one at a time, from this one on. Each has a key and may have `v` and a `text()`. */
export function openViewer(pictures, index) {
  viewed = pictures;
  turn(index);
  at("viewer").showModal();
}

function turn(index) {
  place = Math.min(Math.max(index, 0), viewed.length - 1);
  const picture = viewed[place];
  at("viewer-name").textContent = picture.key;
  at("viewer-picture").src = picture.source ?? address("enlarged", picture.key, { v: picture.v });
  at("viewer-picture").alt = picture.key;
  at("viewer-caption").textContent = picture.text?.() ?? "";
  at("viewer-download").href = address("download", picture.key);
  at("viewer-back").disabled = place === 0;
  at("viewer-on").disabled = place === viewed.length - 1;
}

at("viewer-back").addEventListener("click", () => turn(place - 1));
at("viewer-on").addEventListener("click", () => turn(place + 1));
at("viewer-close").addEventListener("click", () => at("viewer").close());
at("viewer").addEventListener("close", () => at("viewer-picture").removeAttribute("src"));
at("viewer").addEventListener("keydown", (event) => {
  if (event.key === "ArrowRight" || event.key === "PageDown") turn(place + 1);
  if (event.key === "ArrowLeft" || event.key === "PageUp") turn(place - 1);
});

// --- tools ----------------------------------------------------------------------------------------------------------

let waiting;
function search() {
  offset = 0;
  showPictures();
}
at("search").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(search, 300);
});
at("uncaptioned").addEventListener("change", search);
at("filter").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});
at("page-back").addEventListener("click", () => go(-1));
at("page-on").addEventListener("click", () => go(cards.length));
at("remove-selected").addEventListener("click", () => during(at("remove-selected"), () => (
  removePictures(cards.filter((one) => one.box.checked).map((one) => one.picture.key))
)));
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "hidden") saveAll();
});
window.addEventListener("beforeunload", (event) => {
  if (cards.some((one) => one.caption.dirty)) event.preventDefault();
});
