/** Controls for the model's inputs, with their descriptions, limits and errors. */

import { element, withCode } from "../common/dom.js";
import { asEntered, limits, readEntered } from "./schema.js";

/**
 * @typedef {import("./schema.js").Field} Field
 * @typedef {HTMLInputElement | HTMLTextAreaElement} Control
 * @typedef {{field: Field, control: Control, error: HTMLElement}} Row
 */

/** @type {Record<string, number>} the height of a text box in lines; 1 for the others */
const LINES = { prompt: 5, system_prompt: 3, messages: 4, prompt_template: 2 };

export class FieldForm {
  element = element("div", { class: "fields" });
  /** @type {Row[]} */
  #rows = [];

  /**
   * @param {Field[]} fields
   * @param {string} prefix of the controls' ids
   */
  constructor(fields, prefix) {
    const current = fields.filter((field) => !field.deprecated);
    const deprecated = fields.filter((field) => field.deprecated);
    this.element.append(...current.map((field) => this.#build(field, prefix)));
    if (deprecated.length) {
      const rows = element(
        "div",
        { class: "fields" },
        ...deprecated.map((field) => this.#build(field, prefix)),
      );
      this.element.append(
        element("details", { class: "wide-field" }, element("summary", {}, "Deprecated inputs"), rows),
      );
    }
    this.fill({});
  }

  /** @param {Record<string, unknown>} values inputs that are missing get their defaults */
  fill(values) {
    for (const { field, control } of this.#rows) {
      const entered = asEntered(field, values[field.name]);
      if (typeof entered === "string") control.value = entered;
      else if (control instanceof HTMLInputElement) control.checked = entered;
    }
    this.showErrors({});
  }

  /**
   * Read the values, and show what is wrong with them.
   * @returns {Record<string, unknown> | null} null if something is wrong
   */
  read() {
    const { values, errors } = this.#read();
    this.showErrors(errors);
    return Object.keys(errors).length ? null : values;
  }

  /** The values that are valid. Shows no errors about the others. */
  get values() {
    return this.#read().values;
  }

  /** @param {Record<string, string>} errors by the name of the field */
  showErrors(errors) {
    for (const { field, control, error } of this.#rows) {
      const text = errors[field.name] ?? "";
      error.textContent = text;
      error.hidden = text === "";
      control.setAttribute("aria-invalid", String(text !== ""));
    }
  }

  /** The names of the fields whose errors are shown. */
  get invalid() {
    return this.#rows.filter(hasError).map(({ field }) => field.name);
  }

  /** Move the focus to the first control with an error. */
  focusError() {
    const row = this.#rows.find(hasError);
    const details = row?.control.closest("details");
    if (details) details.open = true;
    row?.control.focus();
  }

  #read() {
    /** @type {Record<string, unknown>} */
    const values = {};
    /** @type {Record<string, string>} */
    const errors = {};
    for (const { field, control } of this.#rows) {
      const isCheckbox = control instanceof HTMLInputElement && control.type === "checkbox";
      const { value, error } = readEntered(field, isCheckbox ? control.checked : control.value);
      // The browser gives no value for a number that it cannot read, such as "1e".
      const reason = control.validity.badInput ? "Enter a number." : error;
      if (reason !== null) errors[field.name] = reason;
      else values[field.name] = value;
    }
    return { values, errors };
  }

  /**
   * @param {Field} field
   * @param {string} prefix
   */
  #build(field, prefix) {
    const id = `${prefix}-${field.name}`;
    const control = buildControl(field, { id, "aria-describedby": `${id}-error ${id}-limits ${id}-hint` });
    const error = element("p", { class: "error", id: `${id}-error`, hidden: true });
    this.#rows.push({ field, control, error });
    const label = element("label", { for: id }, field.name);
    const extent = element("span", { class: "limits", id: `${id}-limits` }, limits(field));
    const hint = element("p", { class: "hint", id: `${id}-hint` }, ...withCode(field.description));
    const isSmall = field.kind !== "json" && !(field.name in LINES);
    return element(
      "div",
      { class: `field ${isSmall ? "" : "wide-field"} ${field.kind}` },
      ...(field.kind === "boolean"
        ? [element("div", { class: "check" }, control, label)]
        : [element("div", { class: "label" }, label, extent), control]),
      error,
      hint,
    );
  }
}

/**
 * @param {Field} field
 * @param {Record<string, string>} attributes
 * @returns {Control}
 */
function buildControl(field, attributes) {
  if (field.kind === "boolean") return element("input", { ...attributes, type: "checkbox" });
  if (field.kind === "text" || field.kind === "json") {
    const rows = LINES[field.name] ?? (field.kind === "json" ? 4 : 1);
    return element("textarea", { ...attributes, rows, spellcheck: field.kind === "text" ? "true" : "false" });
  }
  const { minimum: min, maximum: max } = field;
  const step = field.kind === "integer" ? 1 : "any";
  const placeholder = field.default === null ? "unset" : String(field.default);
  return element("input", { ...attributes, type: "number", min, max, step, placeholder });
}

/** @param {Row} row */
function hasError({ control }) {
  return control.getAttribute("aria-invalid") === "true";
}
