/** Buttons that copy text. */

import { announce, element } from "./dom.js";

const SECONDS_SHOWN = 1.5;

/**
 * @param {() => string} text
 * @param {string} [name] what a screen reader calls it, if "Copy" is not clear
 */
export function copyButton(text, name) {
  const button = element("button", { type: "button", class: "quiet", "aria-label": name }, "Copy");
  button.addEventListener("click", async () => {
    const copied = await copy(text());
    button.textContent = copied ? "Copied" : "Not copied";
    announce(copied ? "Copied" : "The browser did not allow the page to copy");
    setTimeout(() => (button.textContent = "Copy"), SECONDS_SHOWN * 1000);
  });
  return button;
}

/**
 * @param {string} text
 * @returns {Promise<boolean>}
 */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyByCommand(text); // without HTTPS there is no navigator.clipboard
  }
}

/** @param {string} text */
function copyByCommand(text) {
  const focused = document.activeElement;
  const area = element("textarea", { class: "hidden-label", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (focused instanceof HTMLElement) focused.focus();
  return copied;
}
