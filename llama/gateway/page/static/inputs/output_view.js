/** The output of a prediction: its text without Markdown, how it ended, its metrics, its price and its log. */

import { copyButton } from "../common/clipboard.js";
import { element } from "../common/dom.js";
import { metricsList } from "../answer/metrics_view.js";
import { PlainText } from "../answer/plain_text.js";
import { logElements } from "../answer/prompt_view.js";
import { Waiting } from "../answer/waiting.js";
import { outputText } from "../gateway/stream.js";

/** @typedef {import("../types.js").Prediction} Prediction */

const REMOVED =
  "The gateway has deleted the inputs, the output and the log. It does so some time after a prediction has ended.";
const DEBUG_HINT = "To see the prompt as the model got it, select debug and run again.";
/** @type {Record<string, string>} */
const STATES = {
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
  #waiting;
  #details = element("div", { class: "details" });
  #actions = element("div", { class: "actions" });

  /**
   * @param {HTMLElement} root
   * @param {import("../types.js").Prices} prices
   * @param {() => Promise<boolean>} isServerReady
   */
  constructor(root, prices, isServerReady) {
    this.#root = root;
    this.#prices = prices;
    this.#waiting = new Waiting(this.#state, isServerReady, (text) => this.#setState(text, true));
    this.#text.element.classList.add("output-text");
    this.#actions.append(copyButton(() => this.#whole, "Copy output"));
    this.clear();
  }

  clear() {
    this.#set("");
    this.#root.replaceChildren(element("p", { class: "hint" }, "Select Run to see the output here."));
  }

  /** Show a prediction that has just been created or was loaded. */
  begin() {
    this.#set("");
    this.#details.replaceChildren();
    this.#actions.hidden = true;
    this.#waiting.stop();
    this.#running();
    this.#root.replaceChildren(this.#state, this.#text.element, this.#actions, this.#details);
  }

  /** @param {string} piece */
  append(piece) {
    const isFirst = this.#whole === "";
    this.#whole += piece;
    this.#text.append(piece);
    if (isFirst) this.#running();
  }

  /** @param {string} text */
  set(text) {
    if (text === this.#whole) return;
    this.#set(text);
    this.#running();
  }

  /** @param {boolean} connected */
  connection(connected) {
    if (connected) return this.#running();
    this.#waiting.stop();
    this.#setState("The connection was lost. Connecting again …", true);
  }

  /** @param {Prediction} prediction that has ended */
  end(prediction) {
    if (!prediction.data_removed) this.set(outputText(prediction));
    this.#waiting.stop();
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

  #running() {
    if (this.#whole === "") return this.#waiting.start();
    this.#waiting.stop();
    this.#setState("Running …", true);
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
