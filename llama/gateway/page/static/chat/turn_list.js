/** The turns of the conversation that is shown. Elements of turns that have not changed are kept. */

import { byId, element } from "../common/dom.js";
import { AnswerView, UserView } from "./turn_view.js";

/** @typedef {import("../types.js").Turn} Turn */

const EXAMPLES = [
  "What is the capital of France?",
  "Explain recursion with a short example in Python.",
  "Compare TCP and UDP in a table.",
];

export class TurnList {
  #root = byId("turns", HTMLElement);
  /** @type {(UserView | AnswerView)[]} */
  #views = [];
  #notice;
  #dependencies;
  #events;

  /**
   * @param {string | null} notice for a new chat
   * @param {import("./turn_view.js").Dependencies} dependencies
   * @param {{onEdit: (index: number) => void, onRetry: () => void, onExample: (text: string) => void}} events
   */
  constructor(notice, dependencies, events) {
    this.#notice = notice;
    this.#dependencies = dependencies;
    this.#events = events;
  }

  /**
   * @param {Turn[]} turns
   * @param {boolean} busy whether an answer is running
   */
  show(turns, busy) {
    let same = 0;
    while (same < turns.length && this.#views[same]?.turn === turns[same]) same++;
    for (const view of this.#views.splice(same)) view.element.remove();
    const added = turns.slice(same).map((turn, offset) => this.#build(turn, same + offset));
    this.#views.push(...added);
    if (!turns.length) this.#root.replaceChildren(introduction(this.#notice, this.#events.onExample));
    else this.#root.querySelector(".introduction")?.remove();
    this.#root.append(...added.map((view) => view.element));
    this.allow(busy);
  }

  /** @param {boolean} busy */
  allow(busy) {
    for (const [index, view] of this.#views.entries()) {
      const isLast = index === this.#views.length - 1;
      view.allow(!busy && (view instanceof UserView || isLast));
    }
  }

  /** The answer that is growing or has just ended. */
  get lastAnswer() {
    const last = this.#views.at(-1);
    return last instanceof AnswerView ? last : null;
  }

  /** @param {number | null} index of the message that is being edited */
  markEdited(index) {
    for (const [position, { element: turn }] of this.#views.entries()) {
      turn.classList.toggle("edited", position === index);
      turn.classList.toggle("dropped", index !== null && position > index);
    }
  }

  /** @param {number} index */
  text(index) {
    return this.#views[index]?.turn.content ?? "";
  }

  /**
   * @param {Turn} turn
   * @param {number} index
   */
  #build(turn, index) {
    if (turn.role === "user") return new UserView(turn, () => this.#events.onEdit(index));
    return new AnswerView(turn, this.#dependencies, () => this.#events.onRetry());
  }
}

/**
 * @param {string | null} notice
 * @param {(text: string) => void} onExample
 */
function introduction(notice, onExample) {
  const examples = EXAMPLES.map((text) =>
    element("li", {}, element("button", { type: "button", click: () => onExample(text) }, text)),
  );
  return element(
    "div",
    { class: "introduction" },
    element("p", {}, "Ask something, or begin with an example."),
    element("ul", {}, ...examples),
    notice ? element("p", { class: "notice-text" }, notice) : null,
  );
}
