/** The request as programs to copy, one tab for each language. */

import { codeBlock } from "../answer/code_block.js";
import { element, withCode } from "../common/dom.js";
import { snippets } from "./snippets.js";

/** @typedef {import("./snippets.js").Request} Request */

const KEY_NEEDED = "Set `REPLICATE_API_TOKEN` to your key before you run it.";
const NO_KEY = "This gateway accepts any key.";

export class SnippetsView {
  #tabs;
  #code = element("pre", { role: "region" });
  #before = element("p", { class: "hint" });
  #panel;
  #selected = 0;
  /** @type {Request | null} */
  #request = null;

  /** @param {HTMLElement} root */
  constructor(root) {
    this.#tabs = ["curl", "Python", "JavaScript"].map((language, index) =>
      element(
        "button",
        { type: "button", role: "tab", id: `tab-${index}`, "aria-controls": "snippet" },
        language,
      ),
    );
    for (const [index, tab] of this.#tabs.entries()) tab.addEventListener("click", () => this.#select(index));
    const list = element("div", { role: "tablist", "aria-label": "Language", class: "tabs" }, ...this.#tabs);
    list.addEventListener("keydown", (event) => this.#keydown(event));
    const block = codeBlock(this.#code);
    this.#panel = element("div", { role: "tabpanel", id: "snippet" }, this.#before, block);
    root.replaceChildren(list, this.#panel);
    this.#select(0);
  }

  /** @param {Request} request */
  show(request) {
    this.#request = request;
    this.#update();
  }

  /** @param {number} index */
  #select(index) {
    this.#selected = index;
    for (const [position, tab] of this.#tabs.entries()) {
      tab.setAttribute("aria-selected", String(position === index));
      tab.tabIndex = position === index ? 0 : -1;
    }
    this.#panel.setAttribute("aria-labelledby", `tab-${index}`);
    this.#update();
  }

  #update() {
    if (!this.#request) return;
    const snippet = snippets(this.#request)[this.#selected];
    this.#code.textContent = snippet?.code ?? "";
    this.#code.setAttribute("aria-label", `${snippet?.language} program`);
    const key = this.#request.needsKey ? KEY_NEEDED : NO_KEY;
    this.#before.replaceChildren(...withCode(`${snippet?.before} ${key}`));
  }

  /** @param {KeyboardEvent} event */
  #keydown(event) {
    const last = this.#tabs.length - 1;
    /** @type {Record<string, number>} */
    const targets = {
      ArrowRight: this.#selected === last ? 0 : this.#selected + 1,
      ArrowLeft: this.#selected === 0 ? last : this.#selected - 1,
      Home: 0,
      End: last,
    };
    const target = targets[event.key];
    if (target === undefined) return;
    event.preventDefault();
    this.#select(target);
    this.#tabs[target]?.focus();
  }
}
