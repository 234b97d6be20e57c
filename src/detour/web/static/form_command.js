/* The job outside of this page: its file, and the command that runs it. */

import { element } from "./app.js";

/** What to type in a terminal. Relative paths begin in the folder. */
export function commandFor(folder, name) {
  return `cd ${quoted(folder)}\ndetour run ${quoted(`${name}.yaml`)}`;
}

const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** Let the browser save a text as a file. */
export function saveAs(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "text/yaml" }));
  element("a", { href: address, download: `${name}.yaml` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
