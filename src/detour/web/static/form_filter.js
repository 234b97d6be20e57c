/* Finding an option among all of them. */

import { Rows } from "./form_fields.js";

const at = (id) => document.getElementById(id);

/** Show the options that fit the words; inside lists, say where they are. */
export function filter(registry) {
  const words = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = (about) => words.every((word) => `${about.label} ${about.path} ${about.help}`.toLowerCase().includes(word));
  let found = 0;
  for (const group of at("groups").children) {
    let here = 0;
    for (const child of group.querySelectorAll(":scope > .few > [data-path]")) {
      const about = registry.get(child.dataset.path).about;
      child.hidden = words.length > 0 && !fits(about) && !about.rows.some(fits);
      here += child.hidden ? 0 : 1;
    }
    group.hidden = here === 0;
    if (words.length) group.open = here > 0;
    found += here;
  }
  const inside = [...registry.values()].filter((field) => field instanceof Rows && at("first").contains(field.element));
  const others = inside.flatMap(({ about }) => about.rows.filter(fits).map((row) => `${row.label} (in each entry of ${about.label})`));
  at("filter-found").textContent = words.length ? [`${found} found`, ...others].join("; ") : "";
  at("more-count").textContent = `${[...registry.values()].filter((field) => at("groups").contains(field.element)).length}`;
}
