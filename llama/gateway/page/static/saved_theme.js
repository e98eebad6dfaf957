/**
 * Applies the theme that was chosen earlier before the page is painted, so it is not a module.
 * `theme.js` changes it.
 */
try {
  const theme = localStorage.getItem("llama:theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // The browser stores nothing for this page; the system's theme is used.
}
