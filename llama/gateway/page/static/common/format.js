/** Numbers as the page shows them. */

/** @typedef {import("../types.js").Metrics} Metrics */
/** @typedef {import("../types.js").Prices} Prices */

const NOTICEABLE = 0.1; // seconds
const WHOLE = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

/** @param {number} number */
export function count(number) {
  return WHOLE.format(number);
}

/**
 * @param {number} dollars
 * @returns {string} exact to a millionth of a dollar below one dollar, and to a hundredth of a cent above
 */
export function money(dollars) {
  const digits = Math.abs(dollars) < 1 ? 6 : 4;
  return `$${dollars.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: digits })}`;
}

/** @param {number} seconds */
export function duration(seconds) {
  return `${seconds.toLocaleString("en-US", { maximumFractionDigits: seconds < 10 ? 2 : 1 })} s`;
}

/**
 * @param {Metrics} metrics
 * @param {Prices} prices
 * @returns {number} dollars
 */
export function priceOf(metrics, prices) {
  const input = (metrics.input_token_count ?? 0) * prices.input;
  const output = (metrics.output_token_count ?? 0) * prices.output;
  return (input + output) / 1e6;
}

/**
 * @param {string} kind
 * @param {number} number
 */
const tokens = (kind, number) => `${kind} ${number === 1 ? "token" : "tokens"}`;

/**
 * The line below an answer, part by part: what is measured, and how much it is. Leaves out what is unknown.
 * @param {Metrics} metrics
 * @param {Prices} prices
 * @returns {{name: string, value: string}[]}
 */
export function metricsLine(metrics, prices) {
  const [input, output, seconds, total, first, given] = [
    metrics.input_token_count,
    metrics.output_token_count,
    metrics.predict_time,
    metrics.total_time,
    metrics.time_to_first_token,
    metrics.tokens_per_second,
  ].map((value) => (typeof value === "number" ? value : undefined)); // a server can give any metric a text
  const queue = total !== undefined && seconds !== undefined ? total - seconds : 0;
  const speed = given ?? (seconds && output ? output / seconds : undefined);
  const price = priceOf({ input_token_count: input, output_token_count: output }, prices);
  const parts = [];
  if (input !== undefined) parts.push({ name: tokens("input", input), value: count(input) });
  if (output !== undefined) parts.push({ name: tokens("output", output), value: count(output) });
  if (input !== undefined) parts.push({ name: "price", value: money(price) });
  if (queue >= NOTICEABLE) parts.push({ name: "in the queue", value: duration(queue) });
  if (first !== undefined) parts.push({ name: "to the first token", value: duration(first) });
  if (speed !== undefined) parts.push({ name: "tokens/s", value: speed.toFixed(1) });
  return parts;
}
