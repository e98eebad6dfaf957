/** The list of the saved dialogues, and what can be done with the one that is shown: rename and delete. */

import { byId, element } from "../common/dom.js";

/** @typedef {import("../types.js").Dialogue} Dialogue */
/** @typedef {import("./saved_dialogues.js").Summary} Summary */

export class DialogueList {
  #list = byId("chat-list", HTMLUListElement);
  #heading = byId("chat-heading", HTMLElement);
  #renameButton = byId("rename-chat", HTMLButtonElement);
  #deleteButton = byId("delete-chat", HTMLButtonElement);
  #form = byId("rename-form", HTMLFormElement);
  #title = byId("rename-title", HTMLInputElement);
  #shown = "";

  /**
   * @param {Object} events
   * @param {() => void} events.onNew
   * @param {(title: string) => void} events.onRename
   * @param {() => void} events.onDelete
   */
  constructor({ onNew, onRename, onDelete }) {
    byId("new-chat", HTMLButtonElement).addEventListener("click", onNew);
    this.#deleteButton.addEventListener("click", onDelete);
    this.#renameButton.addEventListener("click", () => this.#edit());
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      const title = this.#title.value.trim();
      if (title) onRename(title);
      this.#endEdit();
    });
    byId("cancel-rename", HTMLButtonElement).addEventListener("click", () => this.#endEdit());
    this.#form.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation(); // otherwise it would also stop an answer
      this.#endEdit();
    });
  }

  /**
   * @param {Summary[]} dialogues
   * @param {Dialogue} current
   */
  show(dialogues, current) {
    this.#heading.textContent = current.title || "New chat";
    if (this.#form.hidden) this.#renameButton.hidden = this.#deleteButton.hidden = current.turns.length === 0;
    // This is called at every change of the chat. Replacing the list would lose the focus.
    const shown = JSON.stringify([current.id, dialogues.map(({ id, title }) => [id, title])]);
    if (shown === this.#shown) return;
    this.#shown = shown;
    const rows = dialogues.map(({ id, title }) =>
      element(
        "li",
        {},
        element(
          "a",
          { href: `#/chat/${id}`, "aria-current": id === current.id ? "page" : null },
          title || "Untitled",
        ),
      ),
    );
    this.#list.replaceChildren(...rows);
  }

  #edit() {
    this.#title.value = this.#heading.textContent ?? "";
    this.#setEditing(true);
    this.#title.select();
  }

  #endEdit() {
    this.#setEditing(false);
    this.#renameButton.focus();
  }

  /** Leave the form without a change, because another dialogue is shown. */
  cancelEdit() {
    if (!this.#form.hidden) this.#setEditing(false);
  }

  /** @param {boolean} editing */
  #setEditing(editing) {
    this.#form.hidden = !editing;
    this.#heading.hidden = this.#renameButton.hidden = this.#deleteButton.hidden = editing;
  }
}
