/**
 * An answer as Markdown. New text is shown at once as plain text. From time to time, the gateway renders the whole
 * text, and the result replaces what was shown before. If the text cannot be rendered, it stays plain.
 *
 * `fragmentOf` is the only place of the page where HTML becomes elements.
 */

import { codeBlock } from "./code_block.js";
import { element } from "../common/dom.js";
import { ApiError } from "../gateway/errors.js";
import { addText, PlainText } from "./plain_text.js";

/** @typedef {(text: string) => Promise<string>} Render */

const MAX_LENGTH = 100_000; // a longer text stays plain
const PAUSE = 300; // ms between two renderings
const MAX_TAIL = 2000; // characters
const MAX_FAILURES = 4; // in a row
const SHARE = 5; // the pause is at least this many times as long as the browser took to show the last one

const BLOCKS = "p, li, blockquote, h3, h4, h5, h6, td, th, pre > code";

export class MarkdownView {
  element = element("div", { class: "answer-text" });
  #rendered = element("div", { class: "markdown" });
  #plain = new PlainText();
  #tail = element("span", { class: "plain" });
  #render;
  #text = "";
  #renderedLength = 0;
  #timer = 0;
  #pause = PAUSE;
  #failures = 0;
  /** @type {Promise<void> | null} */
  #rendering = null;
  /** @type {string[]} the HTML of each block that is shown */
  #blocks = [];

  /** @param {Render} render */
  constructor(render) {
    this.#render = render;
    this.element.append(this.#rendered, this.#plain.element);
  }

  /** @param {string} piece */
  append(piece) {
    this.#text += piece;
    if (!this.#tail.parentNode) this.#plain.append(piece);
    else if (this.#text.length - this.#renderedLength <= MAX_TAIL) addText(this.#tail, piece);
    else this.#showRest();
    this.#renderSoon();
  }

  /** @param {string} text the whole text */
  set(text) {
    if (text === this.#text) return;
    if (text.startsWith(this.#text)) return this.append(text.slice(this.#text.length));
    this.#text = text;
    this.#showPlain();
    this.#renderSoon();
  }

  /** Render the whole text, which does not grow any more. If the gateway is busy, it is rendered later. */
  async finish() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    await this.#rendering;
    if (this.#renderedLength < this.#text.length) await this.#renderNow();
    if (this.#failures) this.#renderSoon();
    if (this.#tail.textContent === "") this.#tail.remove();
  }

  #renderSoon() {
    if (this.#timer || this.#rendering || this.#failures >= MAX_FAILURES) return;
    this.#timer = setTimeout(async () => {
      this.#timer = 0;
      await this.#renderNow();
      if (this.#renderedLength < this.#text.length && this.#text.length <= MAX_LENGTH) this.#renderSoon();
    }, this.#pause);
  }

  #renderNow() {
    this.#rendering ??= this.#replaceRendered().finally(() => (this.#rendering = null));
    return this.#rendering;
  }

  async #replaceRendered() {
    const text = this.#text;
    if (text.length > MAX_LENGTH) return this.#showPlain();
    try {
      const html = await this.#render(text);
      const started = performance.now();
      if (!this.#text.startsWith(text)) return; // it was replaced in the meantime
      this.#show(html);
      this.#renderedLength = text.length;
      this.#showRest();
      void this.element.offsetHeight; // the layout takes most of the time, so it is measured, too
      this.#pause = Math.max(PAUSE, SHARE * (performance.now() - started));
      this.#failures = 0;
    } catch (error) {
      const isTemporary = error instanceof ApiError && error.isTemporary;
      this.#pause *= 2;
      this.#failures = isTemporary ? this.#failures + 1 : MAX_FAILURES;
    }
  }

  #showPlain() {
    if (this.#renderedLength === 0 && this.#text.length > MAX_LENGTH && this.#isPlain) return;
    this.#show("");
    this.#renderedLength = 0;
    this.#showRest();
  }

  /** Show the text that is not rendered yet: in the last line if it is short, otherwise in a block below. */
  #showRest() {
    const rest = this.#text.slice(this.#renderedLength);
    const host = rest.length <= MAX_TAIL ? lastBlock(this.#rendered) : null;
    this.#tail.textContent = host ? rest : "";
    if (host?.matches("code") && this.#text[this.#renderedLength - 1] !== "\n") dropNewline(host);
    if (host) host.append(this.#tail);
    else this.#tail.remove();
    this.#plain.set(host ? "" : rest);
  }

  get #isPlain() {
    return this.#blocks.length === 0 && this.#plain.element.childElementCount > 0;
  }

  /**
   * Replace the blocks from the first one that has changed, so that a selection in the others is kept.
   * @param {string} html
   */
  #show(html) {
    this.#tail.remove(); // then the last block is as it was rendered
    const elements = [...fragmentOf(html).children];
    const blocks = elements.map((block) => block.outerHTML);
    let same = 0;
    while (same < blocks.length && blocks[same] === this.#blocks[same]) same++;
    while (this.#rendered.childElementCount > same) this.#rendered.lastElementChild?.remove();
    const added = element("div");
    added.append(...elements.slice(same));
    complete(added);
    this.#rendered.append(...added.children);
    this.#blocks = blocks;
  }
}

/**
 * @param {HTMLElement} root
 * @returns {Element | null} the block that contains the last text
 */
function lastBlock(root) {
  let block = root.lastElementChild;
  for (let inner = block; inner; inner = inner.lastElementChild) if (inner.matches(BLOCKS)) block = inner;
  return block?.matches(BLOCKS) ? block : null;
}

/** @param {Element} code that was rendered with a newline at its end, although its last line goes on */
function dropNewline(code) {
  const end = code.lastChild;
  if (end instanceof Text && end.data.endsWith("\n")) end.deleteData(end.length - 1, 1);
}

/**
 * @param {string} html from the gateway, which has sanitised it
 * @returns {DocumentFragment}
 */
function fragmentOf(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  return template.content;
}

/**
 * Add Copy buttons to code blocks, and let wide tables scroll. The gateway has already left out images, and
 * made links open in a new tab.
 * @param {HTMLElement} root
 */
function complete(root) {
  for (const code of root.querySelectorAll("pre")) {
    const language = /language-(\S+)/.exec(code.firstElementChild?.className ?? "")?.[1];
    codeBlock(code, { label: language, copyName: "Copy code" });
  }
  for (const table of root.querySelectorAll("table")) {
    const scroller = element("div", {
      class: "scroller",
      tabindex: 0,
      role: "region",
      "aria-label": "Table",
    });
    table.replaceWith(scroller);
    scroller.append(table);
  }
}
