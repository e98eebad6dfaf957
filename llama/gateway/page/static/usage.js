/** The usage of the key: totals, a table by day, the budget of the month, and the prices. */

import { byId, element } from "./common/dom.js";
import { describe } from "./gateway/errors.js";
import { count, money } from "./common/format.js";

/**
 * @typedef {import("./types.js").UsageReport} UsageReport
 * @typedef {import("./types.js").UsageCounts} UsageCounts
 * @typedef {import("./types.js").Budget} Budget
 */

/** @type {[string, (counts: UsageCounts) => string][]} */
const COLUMNS = [
  ["Predictions", (counts) => count(counts.predictions)],
  ["Input tokens", (counts) => count(counts.input_tokens)],
  ["Output tokens", (counts) => count(counts.output_tokens)],
  ["Price", (counts) => money(counts.price)],
  ["Server seconds", (counts) => counts.seconds.toLocaleString("en-US", { maximumFractionDigits: 1 })],
];

export class UsageView {
  #api;
  #prices;
  #root = byId("usage", HTMLElement);
  #since = byId("usage-since", HTMLInputElement);
  #loads = 0;

  /**
   * @param {import("./gateway/api.js").Api} api
   * @param {import("./types.js").Session} session
   */
  constructor(api, session) {
    this.#api = api;
    this.#prices = session.prices;
    this.#since.addEventListener("change", () => void this.open());
    byId("usage-form", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      void this.open();
    });
  }

  async open() {
    const load = ++this.#loads;
    try {
      const report = await this.#api.usage(this.#since.value);
      if (load !== this.#loads) return; // another day was chosen in the meantime
      this.#since.value ||= report.since;
      this.#root.replaceChildren(...this.#elements(report));
    } catch (error) {
      if (load !== this.#loads) return;
      this.#root.replaceChildren(element("p", { class: "error", role: "alert" }, describe(error)));
    }
  }

  /** @param {UsageReport} report */
  #elements({ rows, total, budget }) {
    const { input, output } = this.#prices;
    const prices = `Prices: ${money(input)} per million input tokens, ${money(output)} per million output tokens.`;
    return [
      element("h2", {}, "Total"),
      totals(total),
      ...(budget ? [element("h2", {}, "Budget of this month"), ...meters(budget)] : []),
      element("h2", { id: "by-day" }, "By day"),
      rows.length ? table(rows) : element("p", { class: "empty" }, "There is no usage since this day."),
      element("p", { class: "hint" }, prices),
    ];
  }
}

/** @param {UsageCounts} total */
function totals(total) {
  const groups = COLUMNS.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value(total))),
  );
  return element("dl", { class: "totals" }, ...groups);
}

/** @param {Budget} budget */
function meters({ tokens, dollars, tokens_used: tokensUsed, dollars_used: dollarsUsed }) {
  const made = [];
  if (tokens !== null)
    made.push(meter("budget-tokens", tokensUsed, tokens, `${count(tokensUsed)} of ${count(tokens)} tokens`));
  if (dollars !== null)
    made.push(meter("budget-dollars", dollarsUsed, dollars, `${money(dollarsUsed)} of ${money(dollars)}`));
  return made;
}

/**
 * @param {string} id
 * @param {number} used
 * @param {number} limit
 * @param {string} text
 */
function meter(id, used, limit, text) {
  const left = used >= limit ? "The budget is used up." : `${Math.floor((100 * used) / limit)} percent used`;
  const bar = element("meter", {
    id,
    min: 0,
    max: limit || 1,
    low: 0.7 * limit, // yellow from here on
    high: 0.9 * limit, // red from here on
    optimum: 0,
    value: Math.min(used, limit),
  });
  return element(
    "p",
    { class: "budget" },
    element("label", { for: id }, text),
    bar,
    element("span", { class: "hint" }, left),
  );
}

/** @param {import("./types.js").UsageRow[]} rows */
function table(rows) {
  const models = new Set(rows.map((row) => row.model));
  const withModel = models.size > 1;
  const heads = ["Day", ...(withModel ? ["Model"] : []), ...COLUMNS.map(([name]) => name)];
  const body = [...rows]
    .sort((one, other) => other.day.localeCompare(one.day))
    .map((row) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, row.day),
        ...(withModel ? [element("td", { class: "name" }, row.model)] : []),
        ...COLUMNS.map(([, value]) => element("td", {}, value(row))),
      ),
    );
  const head = element("tr", {}, ...heads.map((name) => element("th", { scope: "col" }, name)));
  return element(
    "div",
    { class: "scroller", tabindex: 0, role: "region", "aria-labelledby": "by-day" },
    element(
      "table",
      { class: "numbers", "aria-labelledby": "by-day" },
      element("thead", {}, head),
      element("tbody", {}, ...body),
    ),
  );
}
