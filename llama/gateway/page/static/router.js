/** The addresses of the views: the part of the URL after the #. Knows nothing about the DOM. */

/** @typedef {{view: "chat" | "inputs" | "usage", id: string}} Route */

const PREDICTIONS = /^#\/predictions\/([\w-]+)$/;
const CHAT = /^#\/chat\/([\w-]+)$/;

/**
 * @param {string} hash
 * @returns {Route} the chat if the address is unknown
 */
export function routeOf(hash) {
  const prediction = PREDICTIONS.exec(hash);
  if (prediction) return { view: "inputs", id: prediction[1] ?? "" };
  if (hash === "#/inputs") return { view: "inputs", id: "" };
  if (hash === "#/usage") return { view: "usage", id: "" };
  return { view: "chat", id: CHAT.exec(hash)?.[1] ?? "" };
}
