/* Fields made from the schema's description (/api/form). They show values and tell of changes; the text is elsewhere. */

import { element } from "./app.js";

let count = 0;

/** The value at a path such as `datasets[0].flip_x`; undefined where there is none. */
export function valueAt(values, path) {
  let here = values;
  for (const part of path.replace(/\[(\d+)\]/g, ".$1").split(".")) {
    if (here === null || typeof here !== "object") return undefined;
    here = here[part];
  }
  return here ?? undefined;
}

/** Text with what stands between backticks as code. */
export function explained(text) {
  return text.split("`").map((part, place) => (place % 2 ? element("code", {}, part) : part));
}

/** A value as a person reads it. */
export function shown(value) {
  if (value === undefined || value === null || value === "") return "not set";
  if (typeof value === "boolean") return value ? "on" : "off";
  if (typeof value === "object") return written(value) || "none";
  return number(value);
}

/** Small numbers as people write them: 1e-4. */
function number(value) {
  return typeof value === "number" && value !== 0 && Math.abs(value) < 0.001 ? value.toExponential() : String(value);
}

/** One option. `host` is told of changes: `changed(path, value, soon)`. */
export class Field {
  constructor(about, path, host) {
    this.about = about;
    this.path = path;
    this.host = host;
    this.id = `option-${(count += 1)}`;
    this.control = this.makeControl();
    this.control.id = this.id;
    this.control.setAttribute("aria-describedby", `${this.id}-help ${this.id}-error`);
    this.message = element("p", { class: "error", id: `${this.id}-error`, hidden: true });
    this.reset = element("button", { type: "button", hidden: true, title: "To the default", "aria-describedby": `${this.id}-label` }, "Reset");
    this.reset.addEventListener("click", () => host.changed(this.path, null, true));
    const label = element("label", { for: this.id, id: `${this.id}-label` }, about.label);
    const unit = about.unit ? element("span", { class: "unit" }, about.unit) : null;
    const head = element("div", { class: "head" }, about.kind === "switch" ? this.control : null, label, unit, this.reset);
    this.help = element("p", { class: "help", id: `${this.id}-help` });
    this.element = element(
      "div", { class: `field ${about.kind}`, "data-path": path }, head,
      about.kind === "switch" ? null : this.control, this.message, this.help,
    );
    this.describe(about.default);
  }

  get name() {
    return this.path.startsWith("config.") ? this.path.slice(7) : this.path;
  }

  /** What it is, what is allowed, and what it is when it is left out. */
  describe(byDefault) {
    const { about } = this;
    const facts = [`\`${this.name}\``];
    if (!["", "text", "path"].includes(about.allowed) && !["choice", "switch"].includes(about.kind)) facts.push(about.allowed);
    if (!about.required && shown(byDefault) !== "not set") facts.push(`default: ${shown(byDefault)}`);
    this.help.replaceChildren(...explained(`${about.help} `), ...explained(facts.join(" · ")));
  }

  makeControl() {
    const { kind, choices, default: byDefault } = this.about;
    if (this.host.picker(this.about.path)) return this.listen(element("select"), "change", () => this.control.value || null);
    if (kind === "switch") return this.listen(element("input", { type: "checkbox" }), "change", () => this.control.checked);
    if (kind === "choice") {
      const select = element("select");
      if (byDefault === null) select.append(element("option", { value: "" }, "default"));
      select.append(...choices.map((choice) => element("option", { value: choice }, choice)));
      return this.listen(select, "change", () => select.value || null);
    }
    const long = kind === "mapping" || /(^|\.)(prompt|prompts\[\d+\]|default_caption)$/.test(this.path);
    const typed = long ? element("textarea", { rows: 2 }) : element("input", { type: "text", spellcheck: "false" });
    if (kind === "integer") typed.inputMode = "numeric";
    if (kind === "number") typed.inputMode = "decimal";
    typed.addEventListener("change", () => this.host.changed(this.path, typed.value, true));
    return this.listen(typed, "input", () => typed.value, false);
  }

  listen(control, event, read, soon = true) {
    control.addEventListener(event, () => this.host.changed(this.path, read(), soon));
    control.addEventListener("blur", () => this.host.left(this.path));
    return control;
  }

  /** Show a value, unless somebody is typing here. `byDefault` is what it is when it is left out. */
  show(value, byDefault) {
    const given = value !== undefined;
    this.element.classList.toggle("given", given && !this.about.required);
    this.reset.hidden = !given || this.about.required;
    this.describe(byDefault);
    if (this.host.picker(this.about.path)) {
      this.pick(value);
    } else if (this.about.kind === "switch") {
      this.control.checked = (value ?? byDefault) === true;
    } else if (this.about.kind === "choice") {
      this.choose(value, byDefault);
    } else {
      this.control.placeholder = this.about.required || shown(byDefault) === "not set" ? "" : shown(byDefault);
      if (document.activeElement !== this.control) this.control.value = written(value);
    }
  }

  choose(value, byDefault) {
    const empty = this.control.querySelector("option[value='']");
    if (empty) empty.textContent = byDefault === undefined || byDefault === null ? "not set" : `default (${shown(byDefault)})`;
    this.select(value ?? byDefault, value === undefined && empty);
  }

  select(value, empty) {
    const wanted = empty ? "" : String(value ?? "");
    this.control.querySelector("option[data-other]")?.remove();
    if (![...this.control.options].some((option) => option.value === wanted)) {
      this.control.append(element("option", { value: wanted, "data-other": true }, wanted));
    }
    this.control.value = wanted;
  }

  /** A dataset of the UI, or the folder that the job file names. */
  pick(value) {
    const choices = this.host.picker(this.about.path);
    const wanted = typeof value === "string" ? value : "";
    const other = wanted && !choices.some((choice) => choice.path === wanted);
    this.control.replaceChildren(
      element("option", { value: "" }, choices.length ? "Choose a dataset" : "There is no dataset yet"),
      ...choices.map((choice) => element("option", { value: choice.path }, choice.name)),
      ...(other ? [element("option", { value: wanted }, `folder ${wanted}`)] : []),
    );
    this.control.value = wanted;
  }

  /** Show what is wrong with it; an empty text for nothing. */
  fail(text) {
    this.message.textContent = text;
    this.message.hidden = !text;
    if (text) this.control.setAttribute("aria-invalid", "true");
    else this.control.removeAttribute("aria-invalid");
  }

  focus() {
    for (let around = this.element.parentElement; around; around = around.parentElement) {
      if (around.tagName === "DETAILS") around.open = true;
    }
    this.control.focus();
    this.element.scrollIntoView({ block: "center" });
  }
}

/** A list whose entries are changed one by one: sections (datasets, prompts, ...) or texts. */
export class Rows {
  constructor(about, path, host) {
    this.about = about;
    this.path = path;
    this.host = host;
    this.one = (about.label.endsWith("s") ? about.label.slice(0, -1) : `${about.label} entry`).toLowerCase();
    this.fields = [];
    this.length = -1;
    this.list = element("ol");
    this.message = element("p", { class: "error", hidden: true });
    this.add = element("button", { type: "button" }, `Add ${this.one}`);
    this.add.addEventListener("click", () => host.listed({ path, action: "add" }));
    this.element = element(
      "fieldset", { class: "rows wide", "data-path": path }, element("legend", {}, about.label),
      element("p", { class: "help" }, ...explained(about.help)), this.list, this.message, this.add,
      about.rows.some((row) => host.picker(row.path)) ? element("a", { href: "/datasets" }, "Make or fill datasets") : null,
    );
  }

  show(value) {
    const length = Array.isArray(value) ? value.length : 0;
    if (length === this.length) return;
    for (const field of this.fields) this.host.forget(field);
    this.fields = [];
    this.length = length;
    this.list.replaceChildren(...Array.from({ length }, (_, place) => this.entry(place)));
    for (const field of this.fields) this.host.remember(field);
  }

  entry(place) {
    const path = `${this.path}[${place}]`;
    const first = element("div");
    const more = element("div", { class: "few" });
    if (this.about.kind === "texts") {
      const about = { ...this.about, kind: "text", help: "", label: `${this.about.label} ${place + 1}`, required: true, allowed: "" };
      first.append(this.keep(new Field(about, path, this.host)));
    }
    for (const row of this.about.rows) {
      const field = new Field(row, row.path.replace(`${this.about.path}[]`, path), this.host);
      (row.first === "always" ? first : more).append(this.keep(field));
    }
    const named = `${this.one} ${place + 1}`;
    const few = more.childElementCount && first.childElementCount;
    return element(
      "li", { class: "entry", "aria-label": named }, first.childElementCount ? first : null,
      few ? element("details", {}, element("summary", {}, `More options of ${named}`), more) : more,
      element(
        "div", { class: "tools" },
        this.tool("Up", `Move ${named} up`, place > 0, { action: "move", index: place, to: place - 1 }),
        this.tool("Down", `Move ${named} down`, place + 1 < this.length, { action: "move", index: place, to: place + 1 }),
        this.tool("Remove", `Remove ${named}`, true, { action: "remove", index: place }),
      ),
    );
  }

  tool(text, label, possible, change) {
    const button = element("button", { type: "button", "aria-label": label, disabled: !possible }, text);
    button.addEventListener("click", () => this.host.listed({ path: this.path, ...change }));
    return button;
  }

  /** After a change: go on where it was made. */
  follow(change) {
    const entry = this.list.children[change.action === "add" ? this.length - 1 : change.to];
    if (change.action === "remove" || !entry) this.add.focus();
    else if (change.action === "add") (entry.querySelector("input, select, textarea") ?? this.add).focus();
    else (entry.querySelector(`button:not([disabled])[aria-label$="${change.to < change.index ? "up" : "down"}"]`) ?? entry.querySelector(".tools button:not([disabled])")).focus();
  }

  keep(field) {
    this.fields.push(field);
    return field.element;
  }

  fail(text) {
    this.message.textContent = text;
    this.message.hidden = !text;
  }

  focus() {
    for (let around = this.element.parentElement; around; around = around.parentElement) {
      if (around.tagName === "DETAILS") around.open = true;
    }
    (this.list.querySelector("input, select, textarea") ?? this.add).focus();
    this.element.scrollIntoView({ block: "center" });
  }
}

/** A value as it is typed. */
function written(value) {
  if (value === undefined || value === null) return "";
  if (Array.isArray(value)) return value.map(number).join(", ");
  if (typeof value === "object") {
    return Object.entries(value).map(([name, inner]) => `${name}: ${JSON.stringify(inner)}`).join("\n");
  }
  return number(value);
}
