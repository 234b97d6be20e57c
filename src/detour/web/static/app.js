/* What all pages share: requests to the API, messages, and making elements without HTML from strings. */

/** Ask the API. Returns what it answered; throws an ApiError with its sentence. `body` is sent as JSON. */
export async function api(method, address, body) {
  const options = { method, headers: {}, credentials: "same-origin" };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  } else if (method !== "GET") {
    options.headers["Content-Type"] = "application/json";
    options.body = "{}";
  }
  let answer;
  try {
    answer = await fetch(address, options);
  } catch {
    throw new ApiError(0, "The server does not answer. Jobs go on; start `detour ui` again to see them.");
  }
  const data = answer.headers.get("Content-Type")?.includes("json") ? await answer.json() : null;
  if (!answer.ok) throw new ApiError(answer.status, data?.error ?? `${answer.status} ${answer.statusText}`, data);
  return data;
}

/** What an address answers once it says that it is complete: of long files each answer has read a piece more. */
export async function whole(address, each = () => {}) {
  for (;;) {
    const found = await api("GET", address);
    each(found);
    if (found.complete) return found;
  }
}

export class ApiError extends Error {
  constructor(status, message, data) {
    super(message);
    this.status = status;
    this.data = data;
  }
}

/** Show a sentence for some seconds; errors stay until clicked. */
export function toast(text, kind = "") {
  const shown = element("div", { class: `toast ${kind}` }, text);
  shown.addEventListener("click", () => shown.remove());
  document.getElementById("toasts").append(shown);
  if (kind !== "error") setTimeout(() => shown.remove(), 5000);
}

/** An element with attributes and children; strings become text, never HTML. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Run an action with its button disabled; what goes wrong is shown. What had the focus has it afterwards. */
export async function during(button, action) {
  const focused = button && document.activeElement === button; // a disabled button loses it
  if (button) button.disabled = true;
  try {
    return await action();
  } catch (error) {
    toast(error.message, "error");
    return undefined;
  } finally {
    if (button) button.disabled = false;
    if (focused && document.activeElement === document.body) button.focus();
  }
}
