/**
 * Reads the model's inputs from its OpenAPI document, and the values that a person enters for them.
 *
 * An input that is left empty is unset, unless its default is a text: then empty is a value of its own.
 */

/**
 * @typedef {"text" | "integer" | "number" | "boolean" | "json"} Kind
 *
 * @typedef {Object} Field
 * @property {string} name
 * @property {Kind} kind
 * @property {unknown} default Null if the input has none.
 * @property {string} description
 * @property {number | null} minimum
 * @property {number | null} maximum
 * @property {boolean} deprecated
 * @property {boolean} isArray Whether a value of the kind "json" must be a list.
 */

/** @type {Record<string, Kind>} */
const KINDS = { string: "text", integer: "integer", number: "number", boolean: "boolean" };

/**
 * @param {any} document the OpenAPI document
 * @returns {Field[]} in the order of the schema
 */
export function readFields(document) {
  /** @type {[string, any][]} */
  const properties = Object.entries(document?.components?.schemas?.Input?.properties ?? {});
  properties.sort(([, one], [, other]) => (one["x-order"] ?? Infinity) - (other["x-order"] ?? Infinity) || 0);
  return properties.map(([name, property]) => ({
    name,
    kind: KINDS[property.type] ?? "json",
    default: property.default ?? null,
    description: property.description ?? "",
    minimum: property.minimum ?? null,
    maximum: property.maximum ?? null,
    deprecated: property.deprecated ?? false,
    isArray: property.type === "array",
  }));
}

/**
 * Describe which values an input can have, and the default of a number.
 * @param {Field} field
 */
export function limits(field) {
  const { minimum, maximum } = field;
  const parts = [];
  if (minimum !== null && maximum !== null) parts.push(`${minimum} to ${maximum}`);
  else if (minimum !== null) parts.push(`at least ${minimum}`);
  else if (maximum !== null) parts.push(`at most ${maximum}`);
  if (field.kind === "integer" || field.kind === "number") parts.push(`default ${field.default ?? "unset"}`);
  return parts.join(", ");
}

/**
 * Read what was entered. The value is undefined if the input is unset.
 * @param {Field} field
 * @param {string | boolean} entered
 * @returns {{value: unknown, error: null} | {value: undefined, error: string}}
 */
export function readEntered(field, entered) {
  if (typeof entered === "boolean") return { value: entered, error: null };
  if (field.kind === "text") {
    const unset = entered === "" && typeof field.default !== "string";
    return { value: unset ? undefined : entered, error: null };
  }
  if (entered.trim() === "") return { value: undefined, error: null };
  return field.kind === "json" ? readJson(field, entered) : readNumber(field, entered);
}

/**
 * @param {Field} field
 * @param {string} entered
 */
function readNumber(field, entered) {
  const value = Number(entered);
  const wrong = (/** @type {string} */ text) => ({ value: undefined, error: text });
  if (!Number.isFinite(value)) return wrong(`Enter a number, not ${entered.trim()}.`);
  if (field.kind === "integer" && !Number.isInteger(value)) return wrong("Enter a whole number.");
  if (field.kind === "integer" && !Number.isSafeInteger(value)) {
    return wrong(`Enter a number between -${Number.MAX_SAFE_INTEGER} and ${Number.MAX_SAFE_INTEGER}.`);
  }
  if (field.minimum !== null && value < field.minimum) return wrong(`Enter ${field.minimum} or more.`);
  if (field.maximum !== null && value > field.maximum) return wrong(`Enter ${field.maximum} or less.`);
  return { value, error: null };
}

/**
 * @param {Field} field
 * @param {string} entered
 */
function readJson(field, entered) {
  try {
    const value = JSON.parse(entered);
    if (value === null) return { value: undefined, error: null };
    if (field.isArray && !Array.isArray(value)) {
      return { value: undefined, error: "Enter a JSON list, which starts with [ and ends with ]." };
    }
    return { value, error: null };
  } catch (error) {
    return { value: undefined, error: `This is not valid JSON: ${/** @type {Error} */ (error).message}` };
  }
}

/**
 * Write a value as a person would enter it.
 * @param {Field} field
 * @param {unknown} value undefined and null mean the default
 * @returns {string | boolean}
 */
export function asEntered(field, value) {
  const shown = value ?? field.default;
  if (field.kind === "boolean") return shown === true;
  if (shown === null) return "";
  return field.kind === "json" ? JSON.stringify(shown, null, 2) : String(shown);
}

/**
 * Return the inputs that have to be sent: those that are set and differ from the default.
 * @param {Field[]} fields
 * @param {Record<string, unknown>} values
 * @returns {Record<string, unknown>}
 */
export function changedInputs(fields, values) {
  const changed = fields.filter(({ name, default: standard }) => {
    const value = values[name];
    return value !== undefined && JSON.stringify(value) !== JSON.stringify(standard);
  });
  return Object.fromEntries(changed.map(({ name }) => [name, values[name]]));
}

/**
 * Sort the errors of a response by the input that they are about.
 * @param {Field[]} fields
 * @param {import("../types.js").InvalidField[]} invalid
 * @returns {{byField: Record<string, string>, others: string[]}}
 */
export function errorsByField(fields, invalid) {
  /** @type {Record<string, string>} */
  const byField = {};
  const others = [];
  for (const { field, description } of invalid) {
    const [, name = "", ...path] = field.split(".");
    if (!fields.some((known) => known.name === name)) others.push(`${field}: ${description}`);
    else byField[name] = path.length ? `${path.join(".")}: ${description}` : description;
  }
  return { byField, others };
}
