/** A dialogue and what can be done with its turns. Knows nothing about the DOM, storage or requests. */

/** @typedef {import("../types.js").Dialogue} Dialogue */
/** @typedef {import("../types.js").Turn} Turn */
/** @typedef {import("../types.js").AnswerTurn} AnswerTurn */

const TITLE_LENGTH = 60;

/** @returns {Dialogue} */
export function newDialogue() {
  // Without HTTPS, browsers have no crypto.randomUUID.
  const id = [...crypto.getRandomValues(new Uint8Array(12))]
    .map((byte) => byte.toString(16).padStart(2, "0"))
    .join("");
  return { id, title: "", updated: Date.now(), systemPrompt: null, settings: {}, turns: [] };
}

/**
 * @param {string} text the first message
 * @returns {string}
 */
export function titleFrom(text) {
  const line = text.trim().replace(/\s+/g, " ");
  if (line.length <= TITLE_LENGTH) return line;
  // Without the last word or the half of an emoji that the cut has left.
  return `${line.slice(0, TITLE_LENGTH).replace(/\s\S*$|[\ud800-\udbff]$/, "")} …`;
}

/**
 * The turns as the input `messages`. The roles must alternate, so an answer without any text is left out, and the
 * messages before and after it become one.
 * @param {Turn[]} turns
 * @returns {{role: "user" | "assistant", content: string}[]}
 */
export function messagesOf(turns) {
  /** @type {{role: "user" | "assistant", content: string}[]} */
  const messages = [];
  for (const { role, content } of turns) {
    const last = messages.at(-1);
    if (role === "assistant" && content === "") continue;
    if (last && last.role === role) last.content += `\n\n${content}`;
    else messages.push({ role, content });
  }
  return messages;
}

/**
 * The inputs of the next answer.
 * @param {Dialogue} dialogue
 * @param {Turn[]} turns
 * @param {string | null} defaultSystemPrompt null if it is not known
 * @returns {Record<string, unknown>}
 */
export function inputsFor(dialogue, turns, defaultSystemPrompt) {
  const systemPrompt = dialogue.systemPrompt ?? defaultSystemPrompt;
  return {
    ...dialogue.settings,
    ...(systemPrompt !== null && { system_prompt: systemPrompt }),
    messages: messagesOf(turns),
  };
}

/**
 * The turns without the last answer; the same turns if the last one is not an answer.
 * @param {Turn[]} turns
 */
export function withoutLastAnswer(turns) {
  return turns.at(-1)?.role === "assistant" ? turns.slice(0, -1) : turns;
}

/**
 * Whether a stored item is a dialogue. Another version of the page may have stored it.
 * @param {any} item
 * @returns {item is Dialogue}
 */
export function isDialogue(item) {
  const isTurn = (/** @type {any} */ turn) =>
    typeof turn?.content === "string" && ["user", "assistant"].includes(turn.role);
  return (
    typeof item?.id === "string" &&
    typeof item.title === "string" &&
    typeof item.updated === "number" &&
    typeof item.settings === "object" &&
    item.settings !== null &&
    Array.isArray(item.turns) &&
    item.turns.every(isTurn)
  );
}
