/** The line of metrics below an answer. */

import { element } from "../common/dom.js";
import { metricsLine } from "../common/format.js";

/**
 * @param {import("../types.js").Metrics} metrics
 * @param {import("../types.js").Prices} prices
 */
export function metricsList(metrics, prices) {
  const parts = metricsLine(metrics, prices).map(({ name, value }) =>
    element(
      "li",
      {},
      element("b", {}, value),
      " ",
      element("span", { class: name === "price" ? "hidden-label" : null }, name),
    ),
  );
  return element("ul", { class: "metrics", "aria-label": "Measurements" }, ...parts);
}
