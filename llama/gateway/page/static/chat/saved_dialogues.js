/**
 * All chats of this browser. A chat that the browser cannot store is kept until the page is closed, and a deleted
 * one can be restored. A notice says so in both cases.
 */

import { dismiss, notify } from "../common/notices.js";

/**
 * @typedef {import("../types.js").Dialogue} Dialogue
 * @typedef {Pick<Dialogue, "id" | "title" | "updated">} Summary
 */

const FULL =
  "The browser has no room to store this chat. It is lost when you close the page. " +
  "Delete other chats to make room.";

export class SavedDialogues {
  #store;
  #onChange;
  /** @type {Map<string, Summary>} */
  #summaries = new Map();
  /** @type {Map<string, Dialogue>} */
  #notStored = new Map();
  /** @type {Set<string>} they must not be saved again: an answer may still be running */
  #deleted = new Set();

  /**
   * @param {import("./dialogue_storage.js").DialogueStorage} store
   * @param {() => void} onChange
   */
  constructor(store, onChange) {
    this.#store = store;
    this.#onChange = onChange;
    this.#readAll();
  }

  /** @returns {Summary[]} the chat that was used last comes first */
  get summaries() {
    return [...this.#summaries.values()].sort((one, other) => other.updated - one.updated);
  }

  /** @param {string} id */
  get(id) {
    return this.#notStored.get(id) ?? this.#store.get(id);
  }

  /** @param {Dialogue} dialogue */
  save(dialogue) {
    if (this.#deleted.has(dialogue.id)) return;
    const { id, title, updated } = dialogue;
    this.#summaries.set(id, { id, title, updated });
    try {
      this.#store.save(dialogue);
      this.#notStored.delete(id);
      if (this.#notStored.size === 0) dismiss("storage");
    } catch {
      if (!this.#notStored.has(id)) notify("storage", FULL);
      this.#notStored.set(id, dialogue);
    }
    this.#onChange();
  }

  /** @param {Dialogue} dialogue */
  delete(dialogue) {
    const { id, title } = dialogue;
    this.#deleted.add(id);
    this.#summaries.delete(id);
    this.#notStored.delete(id);
    this.#store.delete(id);
    for (const waiting of this.#notStored.values()) this.save(waiting);
    const restore = () => {
      this.#deleted.delete(id);
      this.save(dialogue);
      location.hash = `#/chat/${id}`;
    };
    const action = { label: "Undo", run: restore };
    notify("chat", `The chat “${title}” was deleted.`, { kind: "info", action });
  }

  /**
   * Another tab has changed an item of the browser's storage.
   * @param {string | null} itemName null if everything was deleted
   * @returns {string | null} the id of the chat in it, if there is one
   */
  changedElsewhere(itemName) {
    const id = this.#store.idOf(itemName);
    if (id === null && itemName !== null) return null;
    this.#readAll();
    this.#onChange();
    return id;
  }

  #readAll() {
    const all = [...this.#store.all(), ...this.#notStored.values()];
    this.#summaries = new Map(all.map(({ id, title, updated }) => [id, { id, title, updated }]));
  }
}
