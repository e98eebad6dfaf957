/** The output of a prediction: its text without Markdown, how it ended, its metrics, its price and its log. */

import { copyButton } from "../common/clipboard.js";
import { element } from "../common/dom.js";
import { metricsList } from "../answer/metrics_view.js";
import { PlainText } from "../answer/plain_text.js";
import { logElements } from "../answer/prompt_view.js";
import { outputText } from "../gateway/stream.js";

/** @typedef {import("../types.js").Prediction} Prediction */

const REMOVED =
  "The gateway has deleted the inputs, the output and the log. It does so some time after a prediction has ended.";
const DEBUG_HINT = "To see the prompt as the model got it, select debug and run again.";
/** @type {Record<string, string>} */
const STATES = {
  starting: "Waiting for the first token …",
  processing: "Running …",
  succeeded: "Succeeded",
  failed: "Failed",
  canceled: "Cancelled",
};

export class OutputView {
  #root;
  #prices;
  #text = new PlainText();
  #whole = "";
  #state = element("p", { class: "state" });
  #details = element("div", { class: "details" });
  #actions = element("div", { class: "actions" });

  /**
   * @param {HTMLElement} root
   * @param {import("../types.js").Prices} prices
   */
  constructor(root, prices) {
    this.#root = root;
    this.#prices = prices;
    this.#text.element.classList.add("output-text");
    this.#actions.append(copyButton(() => this.#whole, "Copy output"));
    this.clear();
  }

  clear() {
    this.#set("");
    this.#root.replaceChildren(element("p", { class: "hint" }, "Select Run to see the output here."));
  }

  /** @param {Prediction} prediction that has just been created or was loaded */
  begin(prediction) {
    this.#set("");
    this.#details.replaceChildren();
    this.#actions.hidden = true;
    this.#setState(STATES[prediction.status] ?? prediction.status, true);
    this.#root.replaceChildren(this.#state, this.#text.element, this.#actions, this.#details);
  }

  /** @param {string} piece */
  append(piece) {
    if (this.#whole === "") this.#setState(STATES.processing ?? "", true);
    this.#whole += piece;
    this.#text.append(piece);
  }

  /** @param {string} text */
  set(text) {
    if (text !== this.#whole) this.#set(text);
  }

  /** @param {boolean} connected */
  connection(connected) {
    const text = connected ? STATES.processing : "The connection was lost. Connecting again …";
    this.#setState(text ?? "", true);
  }

  /** @param {Prediction} prediction that has ended */
  end(prediction) {
    if (!prediction.data_removed) this.set(outputText(prediction));
    this.#setState(STATES[prediction.status] ?? prediction.status, false);
    this.#actions.hidden = this.#whole === "";
    const { error } = prediction;
    this.#details.replaceChildren(
      ...(error ? [element("p", { class: "error" }, error)] : []),
      metricsList(prediction.metrics ?? {}, this.#prices),
      ...this.#log(prediction),
    );
  }

  /** @param {string} reason why nothing can be shown */
  fail(reason) {
    this.#root.replaceChildren(element("p", { class: "error" }, reason));
  }

  /** @param {Prediction} prediction */
  #log(prediction) {
    if (prediction.data_removed) return [element("p", { class: "hint" }, REMOVED)];
    return [element("h3", {}, "Log"), ...logElements(prediction, DEBUG_HINT)];
  }

  /** @param {string} text */
  #set(text) {
    this.#whole = text;
    this.#text.set(text);
  }

  /**
   * @param {string} text
   * @param {boolean} pending
   */
  #setState(text, pending) {
    this.#state.textContent = text;
    this.#state.classList.toggle("pending", pending);
  }
}
