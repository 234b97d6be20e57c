/* The job file's text with line numbers and marks. A plain text area: Tab moves on, the browser's own undo works. */

import { element } from "./app.js";

export class Editor {
  /** `changed` is called with the text whenever a person changes it. */
  constructor(area, gutter, changed) {
    this.area = area;
    this.gutter = gutter;
    this.marks = new Map();
    this.lines = 0;
    area.addEventListener("input", () => {
      this.number();
      changed(area.value);
    });
    area.addEventListener("scroll", () => this.follow());
  }

  get text() {
    return this.area.value;
  }

  /** Show another text; place and scroll position stay as far as they can. */
  set(text) {
    if (text === this.area.value) return;
    const { selectionStart, scrollTop, scrollLeft } = this.area;
    this.area.value = text;
    const at = Math.min(selectionStart, text.length);
    this.area.setSelectionRange(at, at);
    this.area.scrollTop = scrollTop;
    this.area.scrollLeft = scrollLeft;
    this.number();
  }

  /** Mark lines: a map of line to message. */
  mark(marks) {
    this.marks = marks;
    this.number(true);
  }

  /** Put the cursor on a line. */
  goto(line) {
    const lines = this.area.value.split("\n");
    const start = lines.slice(0, line - 1).reduce((sum, shown) => sum + shown.length + 1, 0);
    this.area.focus();
    this.area.setSelectionRange(start, start + (lines[line - 1] ?? "").length);
    const height = this.area.scrollHeight / Math.max(lines.length, 1);
    this.area.scrollTop = Math.max(0, (line - 4) * height);
    this.follow();
  }

  follow() {
    this.gutter.scrollTop = this.area.scrollTop;
  }

  number(anew = false) {
    const lines = this.area.value.split("\n").length;
    if (lines === this.lines && !anew) return;
    this.lines = lines;
    this.gutter.replaceChildren();
    let plain = "";
    for (let line = 1; line <= lines; line += 1) {
      if (!this.marks.has(line)) {
        plain += `${line}\n`;
        continue;
      }
      this.gutter.append(plain, element("span", { class: "bad", title: this.marks.get(line) }, String(line)), "\n");
      plain = "";
    }
    // One line more than there are: the text area scrolls a little further than its last line.
    this.gutter.append(`${plain}\n`);
    this.follow();
  }
}
