/** A block of code or of other fixed text, with a Copy button above it. */

import { copyButton } from "../common/clipboard.js";
import { element } from "../common/dom.js";

/**
 * @param {HTMLElement} code a `pre`
 * @param {{label?: string, copyName?: string}} [names] what the block is, and the name of its button
 */
export function codeBlock(code, { label = "", copyName } = {}) {
  code.tabIndex = 0; // it may be larger than its box, and arrow keys then scroll it
  const button = copyButton(() => code.textContent ?? "", copyName);
  const bar = element("div", { class: "code-bar" }, element("span", {}, label), button);
  const block = element("div", { class: "code-block" });
  code.replaceWith(block);
  block.append(bar, code);
  return block;
}
