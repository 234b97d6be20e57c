/* Hands in the code of a login link, or the token that was typed, and goes on to the page that was asked for. */
import { api } from "./app.js";

const form = document.getElementById("login");
const token = document.getElementById("token");
const wrong = document.getElementById("wrong");

async function logIn(credentials) {
  wrong.hidden = true;
  try {
    await api("POST", "/api/login", credentials);
    goOn();
  } catch (error) {
    if (credentials.code && (await isLoggedIn())) return goOn(); // an old link, opened again
    wrong.textContent = error.message;
    wrong.hidden = false;
    token.focus();
  }
}

function goOn() {
  const here = location.pathname === "/login" ? "/jobs" : location.pathname + location.search;
  location.replace(here); // so that the link is not in the history
}

async function isLoggedIn() {
  try {
    await api("GET", "/api/settings");
    return true;
  } catch {
    return false;
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  logIn({ token: token.value });
});

const code = new URLSearchParams(location.search).get("code");
if (location.pathname === "/login" && code) {
  history.replaceState(null, "", "/login");
  logIn({ code });
}
