/** A disclosure with a prediction's log: the formatted prompt, its control tokens marked, and the other lines. */

import { codeBlock } from "./code_block.js";
import { element } from "../common/dom.js";
import { describe } from "../gateway/errors.js";
import { readLog, splitControlTokens } from "./prompt_log.js";

/** @typedef {import("../types.js").Prediction} Prediction */

const REMOVED = "The gateway has deleted the log of this prediction.";

/**
 * @param {() => Promise<Prediction>} load
 * @param {string} hint how to get the formatted prompt, if the log does not contain it
 * @returns {HTMLDetailsElement} it loads the log when it is opened
 */
export function promptDisclosure(load, hint) {
  const content = element("div");
  const details = element("details", { class: "log" }, element("summary", {}, "Formatted prompt"), content);
  let loaded = false;
  details.addEventListener("toggle", async () => {
    if (!details.open || loaded) return;
    loaded = true;
    content.replaceChildren(element("p", { class: "hint" }, "Loading the log …"));
    try {
      content.replaceChildren(...logElements(await load(), hint));
    } catch (error) {
      loaded = false;
      content.replaceChildren(element("p", { class: "error" }, describe(error)));
    }
  });
  return details;
}

/**
 * @param {Prediction} prediction
 * @param {string} hint how to get the formatted prompt, if the log does not contain it
 * @returns {HTMLElement[]}
 */
export function logElements(prediction, hint) {
  if (prediction.data_removed) return [element("p", { class: "hint" }, REMOVED)];
  const { prompt, rest } = readLog(prediction.logs);
  const first =
    prompt === null ? element("p", { class: "hint" }, hint) : block("Formatted prompt", marked(prompt));
  const title = prompt === null ? "Log" : "The rest of the log";
  return rest ? [first, block(title, [rest])] : [first];
}

/**
 * @param {string} label
 * @param {(Node | string)[]} content
 */
function block(label, content) {
  const pre = element("pre", { role: "region", "aria-label": label }, ...content);
  return codeBlock(pre, { label, copyName: `Copy: ${label}` });
}

/** @param {string} prompt */
function marked(prompt) {
  return splitControlTokens(prompt).map((part, index) =>
    index % 2 ? element("span", { class: "control-token" }, part) : part,
  );
}
