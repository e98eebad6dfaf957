/** The choice between the system's theme, light and dark. `saved_theme.js` applies it at the next load. */

const ITEM = "llama:theme";

/** @param {HTMLSelectElement} select */
export function connectTheme(select) {
  select.value = document.documentElement.dataset.theme ?? "auto";
  select.addEventListener("change", () => {
    if (select.value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = select.value;
    try {
      localStorage.setItem(ITEM, select.value);
    } catch {
      // The choice then lasts until the page is closed.
    }
  });
}
