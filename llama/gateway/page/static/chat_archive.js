/** Stores the chats, and tells the reader when that fails. A chat that was deleted can be brought back. */

import { dismiss, notify } from "./notices.js";

/** @typedef {import("./types.js").Dialogue} Dialogue */

const FULL =
  "The browser has no room to store this chat. It stays on the page until you close it. " +
  "Delete other chats; this one is then stored with its next change.";

export class ChatArchive {
  #store;
  #onChange;
  /** @type {Set<string>} the answer to a deleted chat may still be on its way */
  #deleted = new Set();

  /**
   * @param {import("./dialogues.js").Dialogues} store
   * @param {() => void} onChange
   */
  constructor(store, onChange) {
    this.#store = store;
    this.#onChange = onChange;
  }

  all() {
    return this.#store.all();
  }

  /** @param {string} id */
  get(id) {
    return this.#store.get(id);
  }

  /** @param {string | null} itemName */
  idOf(itemName) {
    return this.#store.idOf(itemName);
  }

  /** @param {Dialogue} dialogue */
  save(dialogue) {
    if (this.#deleted.has(dialogue.id)) return;
    try {
      this.#store.save(dialogue);
      dismiss("storage");
    } catch {
      notify("storage", FULL);
    }
    this.#onChange();
  }

  /** @param {Dialogue} dialogue */
  delete(dialogue) {
    this.#deleted.add(dialogue.id);
    this.#store.delete(dialogue.id);
    const restore = () => {
      this.#deleted.delete(dialogue.id);
      this.save(dialogue);
      location.hash = `#/chat/${dialogue.id}`;
    };
    const text = `The chat “${dialogue.title}” was deleted.`;
    notify("chat", text, { kind: "info", action: { label: "Undo", run: restore } });
  }
}
