/** The form that asks for a key: a view of its own at first, and a dialog if the login ends while the page is used. */

import { element } from "./common/dom.js";
import { ApiError, describe } from "./gateway/errors.js";

const HINT =
  "The operator of this gateway gives out keys. The page does not store the key: " +
  "the browser gets a login cookie that scripts cannot read.";

/**
 * @param {import("./gateway/api.js").Api} api
 * @param {() => void} onDone
 * @param {string} prefix of the controls' ids
 */
export function loginForm(api, onDone, prefix) {
  const key = element("input", {
    type: "password",
    id: `${prefix}-key`,
    autocomplete: "current-password",
    required: true,
    "aria-describedby": `${prefix}-error ${prefix}-hint`,
  });
  const error = element("p", { class: "error", id: `${prefix}-error`, role: "alert" });
  const form = element(
    "form",
    { class: "login" },
    element("label", { for: key.id }, "Key"),
    key,
    error,
    element("p", { class: "hint", id: `${prefix}-hint` }, HINT),
    element(
      "div",
      { class: "login-buttons" },
      element("button", { type: "submit", class: "primary" }, "Log in"),
    ),
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    error.textContent = "";
    try {
      await api.login(key.value.trim());
      key.value = "";
      onDone();
    } catch (problem) {
      const unknown = problem instanceof ApiError && problem.status === 401;
      error.textContent = unknown
        ? "The gateway does not know this key. Check it and try again."
        : describe(problem);
      key.setAttribute("aria-invalid", String(unknown));
      key.select();
    }
  });
  return form;
}

/**
 * Ask for the key in a dialog over the page. Everything that was typed stays.
 * @param {import("./gateway/api.js").Api} api
 * @returns {Promise<boolean>} whether there is a new login
 */
export function askForKey(api) {
  return new Promise((resolve) => {
    const heading = element("h2", { id: "relogin-heading" }, "Log in again");
    const text = element(
      "p",
      {},
      "Your login has ended, or the key was revoked. Nothing that you typed is lost.",
    );
    const dialog = element("dialog", { class: "login-dialog", "aria-labelledby": heading.id });
    const cancel = element(
      "button",
      { type: "button", class: "quiet", click: () => dialog.close() },
      "Not now",
    );
    let done = false;
    const form = loginForm(api, () => ((done = true), dialog.close()), "relogin");
    form.lastElementChild?.append(cancel);
    dialog.append(heading, text, form);
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(done);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
