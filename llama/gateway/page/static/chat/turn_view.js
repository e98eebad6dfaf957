/** The turns of a dialogue as elements: a message of the user, and an answer, which may still grow. */

import { copyButton } from "../common/clipboard.js";
import { element } from "../common/dom.js";
import { MarkdownView } from "../answer/markdown_view.js";
import { metricsList } from "../answer/metrics_view.js";
import { promptDisclosure } from "../answer/prompt_view.js";
import { Waiting } from "../answer/waiting.js";

const DEBUG_HINT = "To see the prompt as the model got it, select debug in Settings and ask again.";

/**
 * @typedef {import("../types.js").AnswerTurn} AnswerTurn
 * @typedef {import("../types.js").UserTurn} UserTurn
 *
 * @typedef {Object} Dependencies
 * @property {import("../gateway/api.js").Api} api
 * @property {import("../types.js").Prices} prices
 * @property {import("../answer/render_queue.js").RenderQueue} rendering
 */

export class UserView {
  turn;
  element;
  #edit;

  /**
   * @param {UserTurn} turn
   * @param {() => void} onEdit
   */
  constructor(turn, onEdit) {
    this.turn = turn;
    this.#edit = element("button", { type: "button", class: "quiet", click: onEdit }, "Edit");
    this.element = element(
      "article",
      { class: "turn user" },
      element("h2", { class: "hidden-label" }, "You"),
      element("p", { class: "plain" }, turn.content),
      element(
        "div",
        { class: "actions" },
        copyButton(() => turn.content, "Copy message"),
        this.#edit,
      ),
    );
  }

  /** @param {boolean} possible whether messages can be edited now */
  allow(possible) {
    this.#edit.disabled = !possible;
  }
}

export class AnswerView {
  turn;
  element;
  #dependencies;
  #text;
  #state = element("p", { class: "state" });
  #details = element("div", { class: "details" });
  /** @type {HTMLElement} */
  #log = element("div");
  #waiting;
  #retry;
  #actions;
  #shown = "-";

  /**
   * @param {AnswerTurn} turn
   * @param {Dependencies} dependencies
   * @param {() => void} onRetry
   */
  constructor(turn, dependencies, onRetry) {
    this.turn = turn;
    this.#dependencies = dependencies;
    this.#text = new MarkdownView((text) => dependencies.rendering.render(text));
    const isServerReady = () => dependencies.api.isServerReady();
    this.#waiting = new Waiting(this.#state, isServerReady, (text) => this.#show(text));
    this.#retry = element("button", { type: "button", class: "quiet", click: onRetry }, "Retry");
    this.#actions = element(
      "div",
      { class: "actions" },
      copyButton(() => turn.content),
      this.#retry,
      element("a", { href: `#/predictions/${turn.predictionId}`, class: "quiet" }, "Open in Inputs"),
    );
    this.element = element(
      "article",
      { class: "turn answer" },
      element("h2", { class: "hidden-label" }, "Answer"),
      this.#text.element,
      this.#state,
      this.#details,
      this.#actions,
    );
    this.#text.set(turn.content);
    if (isRunning(turn)) this.#running();
    else this.end();
  }

  /** @param {string} piece */
  append(piece) {
    this.#text.append(piece);
    this.#running();
  }

  /** @param {string} text the whole text so far */
  set(text) {
    this.#text.set(text);
    this.#running();
  }

  /** @param {boolean} connected */
  connection(connected) {
    if (connected) return this.#running();
    this.#waiting.stop();
    this.#show("The connection was lost. Connecting again …");
  }

  /** @param {boolean} possible whether this is the last answer, and no answer is running */
  allow(possible) {
    this.#retry.hidden = !possible;
  }

  /** The answer has ended: render it for the last time and show how it ended. */
  end() {
    this.#waiting.stop();
    this.#text.set(this.turn.content);
    void this.#text.finish();
    this.#actions.hidden = false;
    const { error, status, metrics, predictionId } = this.turn;
    this.#show(endText(this.turn), status === "failed" || status === "interrupted" ? (error ?? "") : "");
    this.#details.replaceChildren(metricsList(metrics ?? {}, this.#dependencies.prices));
    this.#log.remove();
    this.#log = promptDisclosure(() => this.#dependencies.api.prediction(predictionId), DEBUG_HINT);
    this.#actions.append(this.#log);
  }

  #running() {
    this.#actions.hidden = true;
    if (this.turn.content === "") return this.#waiting.start();
    this.#waiting.stop();
    this.#show("");
  }

  /**
   * @param {string} text
   * @param {string} error
   */
  #show(text, error = "") {
    if (text === this.#shown && !error) return;
    this.#shown = text;
    this.#state.classList.toggle("error", error !== "");
    this.#state.classList.toggle("pending", isRunning(this.turn));
    this.#state.replaceChildren(text, ...(error ? [" ", element("span", { class: "reason" }, error)] : []));
    this.#state.hidden = text === "";
  }
}

/** @param {AnswerTurn} turn */
function isRunning(turn) {
  return turn.status === "starting" || turn.status === "processing";
}

/**
 * @param {AnswerTurn} turn
 * @returns {string} how it ended and what to do; empty if there is nothing to say
 */
function endText({ status, content, metrics }) {
  if (status === "failed") return "The answer failed. Retry, or edit the message.";
  if (status === "canceled") return "The answer was stopped.";
  if (status === "interrupted") return "The answer was interrupted. Retry to get another one.";
  if (metrics?.finish_reason === "length") return "The answer reached the maximum number of tokens.";
  return content.trim() === "" ? "The answer is empty." : "";
}
