/**
 * Reads a prediction's log: the formatted prompt, which the log has as a Python string, and the other lines.
 */

const PROMPT = /^formatted prompt: (["'])(.*)\1$/m;
const CONTROL_TOKEN = /(<\|[^|<>\s]{1,40}\|>|\[\/?INST\]|<<\/?SYS>>|<\/?s>)/;
const ESCAPE = /\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|(.))/gs;
/** @type {Record<string, string>} */
const LETTERS = { n: "\n", r: "\r", t: "\t" };

/**
 * @param {string | null} logs
 * @returns {{prompt: string | null, rest: string}}
 */
export function readLog(logs) {
  const found = PROMPT.exec(logs ?? "");
  const rest = (logs ?? "").replace(PROMPT, "").replace(/\n{2,}/g, "\n");
  return { prompt: found ? unescape(found[2] ?? "") : null, rest: rest.trim() };
}

/** @param {string} text the inside of a Python string literal, as repr() writes it */
function unescape(text) {
  return text.replace(ESCAPE, (escape, two, four, eight, letter) => {
    const digits = two ?? four ?? eight;
    if (!digits) return LETTERS[letter] ?? letter;
    const code = Number.parseInt(digits, 16);
    return code <= 0x10ffff ? String.fromCodePoint(code) : escape; // only a faulty server writes this
  });
}

/**
 * Split a prompt into plain text and what looks like a control token; the two alternate, text first.
 * @param {string} prompt
 * @returns {string[]}
 */
export function splitControlTokens(prompt) {
  return prompt.split(CONTROL_TOKEN);
}
