/* The sizes at which pictures are trained, with the crops as the model will see them. */
import { api, during, element } from "./app.js";
import { follow } from "./dataset_health.js";
import { openViewer } from "./dataset_pictures.js";
import { address, at, count, thumbnail } from "./dataset_tools.js";

const SHOWN = 24; // crops of a bucket

/** Pictures have to be looked at once for their sizes; then the buckets are there at once. */
export async function showBuckets() {
  at("buckets-state").textContent = "Looking at pictures …";
  await follow("POST", show);
}

async function show() {
  const query = { arch: at("arch").value, resolution: at("resolution").value, upscale: at("upscale").checked };
  try {
    const found = await api("GET", address("/buckets", null, query));
    const rest = found.unknown ? `; ${count(found.unknown, "picture")} cannot be used (see Health)` : "";
    at("buckets-state").textContent = `${count(found.buckets.length, "bucket")}, sides divisible by ${found.divisibility}${rest}`;
    at("bucket-list").replaceChildren(...found.buckets.map((bucket) => shown(bucket, query)));
  } catch (error) {
    at("buckets-state").textContent = error.message;
  }
}

function shown(bucket, query) {
  const source = ({ key, v }, small) => address("crops", key, { ...query, v, ...(small ? { small: true } : {}) });
  const pictures = bucket.pictures.map((one) => ({ key: one.key, v: one.v, source: source(one, false) }));
  const images = bucket.pictures.slice(0, SHOWN).map((one, place) => element("figure", {},
    thumbnail(one.key, source(one, true), () => openViewer(pictures, place)), element("figcaption", {}, one.key)));
  const rest = bucket.count - images.length;
  return element("section", { class: "card", "data-bucket": `${bucket.width}x${bucket.height}` },
    element("h2", {}, `${bucket.width} × ${bucket.height}: ${count(bucket.count, "picture")}`),
    element("p", { class: "quiet" }, `${Math.round(bucket.kept * 100)} % of their area is seen, on average`),
    element("div", { class: "strip" }, ...images),
    rest > 0 ? element("p", { class: "quiet" }, `and ${rest} more`) : null);
}

at("bucket-form").addEventListener("submit", (event) => {
  event.preventDefault();
  during(event.submitter, async () => {
    await api("PATCH", address(""), { arch: at("arch").value, resolution: Number(at("resolution").value) });
    await showBuckets();
  });
});
