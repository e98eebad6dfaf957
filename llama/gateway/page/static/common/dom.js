/** Helpers to find and to build elements. Text always becomes a text node: nothing here takes HTML. */

/**
 * @template {HTMLElement} T
 * @param {string} id
 * @param {new () => T} kind
 * @returns {T}
 */
export function byId(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`The page has no #${id}.`);
  return found;
}

/**
 * Create an element. An attribute that is a function listens to the event of that name; `false` and null leave
 * an attribute out.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, string | number | boolean | null | undefined | ((event: any) => void)>} [attributes]
 * @param {...(Node | string | null)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, String(value));
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** @param {string} text with code between backticks */
export function withCode(text) {
  return text.split("`").map((part, index) => (index % 2 ? element("code", {}, part) : part));
}

/**
 * Let screen readers say something that others see anyway.
 * @param {string} text
 */
export function announce(text) {
  const announcer = byId("announcer", HTMLElement);
  announcer.textContent = "";
  // Some screen readers say the same text twice only if it was absent in between.
  setTimeout(() => (announcer.textContent = text), 50);
}
