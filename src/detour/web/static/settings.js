/* The settings page. */
import { api, during, toast } from "./app.js";

const at = (id) => document.getElementById(id);

at("theme").value = localStorage.getItem("theme") ?? "";
at("theme").addEventListener("change", () => {
  const theme = at("theme").value;
  if (theme) localStorage.setItem("theme", theme);
  else localStorage.removeItem("theme");
  document.documentElement.style.colorScheme = theme;
});

at("hub-form").addEventListener("submit", (event) => {
  event.preventDefault();
  during(event.submitter, async () => {
    await api("PUT", "/api/settings/hub-token", { token: at("hub-token").value });
    at("hub-token").value = "";
    at("hub-remove").hidden = false;
    at("hub-state").textContent = "There is a token. Jobs use it to download models.";
    toast("The token is saved.");
  });
});

at("hub-remove").addEventListener("click", () =>
  during(at("hub-remove"), async () => {
    await api("DELETE", "/api/settings/hub-token");
    at("hub-remove").hidden = true;
    at("hub-state").textContent = "There is none. Jobs use that of the environment, if there is one.";
    toast("The token is removed.");
  }),
);

at("log-out").addEventListener("click", () =>
  during(at("log-out"), async () => {
    await api("DELETE", "/api/session");
    location.assign("/login");
  }),
);

at("log-out-all").addEventListener("click", () =>
  during(at("log-out-all"), async () => {
    await api("POST", "/api/session/renew");
    toast("All other browsers are logged out.");
  }),
);
