/** Notices at the top of the page, such as errors. Each stays until it is dismissed, replaced or outdated. */

import { byId, element } from "./dom.js";

/** @typedef {{label: string, run: () => void}} Action */

/**
 * Show a message. It replaces the one with the same topic.
 * @param {string} topic
 * @param {string} text
 * @param {{kind?: "error" | "info", action?: Action}} [options]
 */
export function notify(topic, text, { kind = "error", action } = {}) {
  const shown = find(topic).find((notice) => notice.firstElementChild?.textContent === text);
  if (shown) return; // screen readers would say it again
  dismiss(topic);
  const close = () => notice.remove();
  const notice = element(
    "div",
    { class: `notice ${kind}`, role: kind === "error" ? "alert" : "status", "data-topic": topic },
    element("p", {}, text),
    action ? element("button", { type: "button", click: () => (close(), action.run()) }, action.label) : null,
    element("button", { type: "button", class: "quiet", click: close }, "Dismiss"),
  );
  byId("notices", HTMLElement).append(notice);
}

/** @param {...string} topics */
export function dismiss(...topics) {
  for (const notice of topics.flatMap(find)) notice.remove();
}

/** @param {string} topic */
function find(topic) {
  const notices = [...byId("notices", HTMLElement).children];
  return notices.filter((notice) => notice instanceof HTMLElement && notice.dataset.topic === topic);
}
