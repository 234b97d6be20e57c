/* Before anything is drawn: the light or dark that was chosen in this browser (settings page), else the system's. */
try {
  const theme = localStorage.getItem("theme");
  if (theme === "light" || theme === "dark") document.documentElement.style.colorScheme = theme;
} catch {
  // a browser that keeps nothing for us: the system's
}
