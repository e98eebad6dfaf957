/** Text that grows, in blocks of lines: the browser lays out only the last block again for each new piece. */

import { element } from "./dom.js";

const BLOCK = 4000; // characters

export class PlainText {
  element = element("div", { class: "plain" });
  /** @type {HTMLElement | null} */
  #last = null;
  #lastLength = 0;

  /** @param {string} text */
  set(text) {
    this.element.replaceChildren();
    this.#last = null;
    this.append(text);
  }

  /** @param {string} text */
  append(text) {
    for (let start = 0; start < text.length;) {
      if (!this.#last) this.#open();
      const room = Math.max(0, BLOCK - this.#lastLength);
      // A block ends with a line, because the next block begins on a new one.
      const newline = text.indexOf("\n", start + room);
      const end = newline === -1 ? text.length : newline;
      this.#add(text.slice(start, end));
      this.#lastLength += end - start;
      start = newline === -1 ? end : newline + 1;
      if (newline !== -1) this.#last = null;
    }
  }

  /** @param {string} text */
  #add(text) {
    const node = this.#last?.lastChild;
    if (node instanceof Text) node.appendData(text);
    else this.#last?.append(text);
  }

  #open() {
    this.#last = element("div");
    this.#lastLength = 0;
    this.element.append(this.#last);
  }
}
