/** Text that grows, in blocks of lines: the browser lays out only the last block again for each new piece. */

import { element } from "../common/dom.js";

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
      if (this.#last) addText(this.#last, text.slice(start, end));
      this.#lastLength += end - start;
      start = newline === -1 ? end : newline + 1;
      if (newline !== -1) this.#last = null;
    }
  }

  #open() {
    this.#last = element("div");
    this.#lastLength = 0;
    this.element.append(this.#last);
  }
}

/**
 * Append text to an element, to the text that is already at its end if there is one.
 * @param {HTMLElement} target
 * @param {string} text
 */
export function addText(target, text) {
  if (target.lastChild instanceof Text) target.lastChild.appendData(text);
  else target.append(text);
}
