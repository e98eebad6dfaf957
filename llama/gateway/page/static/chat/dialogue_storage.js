/**
 * The dialogues that this browser stores. Each has an item of its own, so that two tabs do not overwrite each
 * other's dialogues.
 */

import { isDialogue } from "./dialogue.js";

/** @typedef {import("../types.js").Dialogue} Dialogue */
/** @typedef {Pick<Storage, "length" | "key" | "getItem" | "setItem" | "removeItem">} ItemStorage */

/** The browser has no room left, or stores nothing for this page. */
export class NotStored extends Error {}

export class DialogueStorage {
  #storage;
  #prefix;

  /**
   * @param {ItemStorage} storage
   * @param {string} owner whose dialogues these are: a part of the items' names
   */
  constructor(storage, owner) {
    this.#storage = storage;
    this.#prefix = `llama:dialogue:${owner}:`;
  }

  /** @returns {Dialogue[]} in any order */
  all() {
    const ids = Array.from({ length: this.#storage.length }, (_, index) =>
      this.idOf(this.#storage.key(index)),
    );
    return ids.map((id) => (id === null ? null : this.get(id))).filter((found) => found !== null);
  }

  /**
   * @param {string} id
   * @returns {Dialogue | null}
   */
  get(id) {
    try {
      const item = JSON.parse(this.#storage.getItem(this.#prefix + id) ?? "null");
      return isDialogue(item) ? item : null;
    } catch {
      return null;
    }
  }

  /**
   * @param {Dialogue} dialogue
   * @throws {NotStored} and keeps what was stored before
   */
  save(dialogue) {
    try {
      this.#storage.setItem(this.#prefix + dialogue.id, JSON.stringify(dialogue));
    } catch (error) {
      throw new NotStored("The browser could not store the dialogue.", { cause: error });
    }
  }

  /** @param {string} id */
  delete(id) {
    this.#storage.removeItem(this.#prefix + id);
  }

  /**
   * @param {string | null} itemName the name of an item of the storage
   * @returns {string | null} the id of the dialogue in it, if it is one of these
   */
  idOf(itemName) {
    return itemName?.startsWith(this.#prefix) ? itemName.slice(this.#prefix.length) : null;
  }
}

/**
 * The browser's storage, or one that lasts until the page is closed if there is none.
 * @returns {ItemStorage}
 */
export function browserStorage() {
  try {
    return localStorage ?? memoryStorage(); // an app that shows web pages may have switched it off
  } catch {
    return memoryStorage();
  }
}

/** @returns {ItemStorage} */
function memoryStorage() {
  /** @type {Map<string, string>} */
  const items = new Map();
  return {
    get length() {
      return items.size;
    },
    key: (index) => [...items.keys()][index] ?? null,
    getItem: (name) => items.get(name) ?? null,
    setItem: (name, value) => void items.set(name, value),
    removeItem: (name) => void items.delete(name),
  };
}
