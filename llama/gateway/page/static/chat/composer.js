/** The box for the next message. It also edits an earlier message, and restores the draft afterwards. */

import { byId, element } from "../common/dom.js";

export class Composer {
  #box = byId("message", HTMLTextAreaElement);
  #send = byId("send", HTMLButtonElement);
  #stop = byId("stop", HTMLButtonElement);
  #state = byId("composer-state", HTMLElement);
  /** @type {{index: number, draft: string} | null} */
  #editing = null;
  #busy = false;
  #onSend;
  #onEdit;

  /**
   * @param {string} draftName under which the tab stores the draft
   * @param {Object} events
   * @param {(text: string, index: number | null) => Promise<boolean>} events.onSend whether it was accepted
   * @param {() => void} events.onStop
   * @param {(index: number | null) => void} events.onEdit which message is being edited
   */
  constructor(draftName, { onSend, onStop, onEdit }) {
    this.#onSend = onSend;
    this.#onEdit = onEdit;
    byId("composer", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#submit();
    });
    this.#box.addEventListener("keydown", (event) => this.#keydown(event));
    this.#box.addEventListener("input", () => this.#fit());
    this.#stop.addEventListener("click", onStop);
    addEventListener("resize", () => this.#fit());
    this.#keepDraft(draftName);
  }

  get isEditing() {
    return this.#editing !== null;
  }

  focus() {
    this.#fit();
    this.#box.focus();
  }

  /** @param {boolean} busy whether an answer is running */
  setBusy(busy) {
    const hadFocus = document.activeElement === this.#send || document.activeElement === this.#stop;
    this.#busy = busy;
    this.#send.hidden = busy;
    this.#stop.hidden = !busy;
    if (hadFocus) (busy ? this.#stop : this.#box).focus();
  }

  /** @param {string} text which can be changed before it is sent */
  fill(text) {
    this.#fill(text);
    this.#box.focus();
  }

  /**
   * @param {number} index
   * @param {string} text
   */
  edit(index, text) {
    this.#editing = { index, draft: this.#editing?.draft ?? this.#box.value };
    this.#fill(text);
    const cancel = element(
      "button",
      { type: "button", class: "quiet", click: () => this.cancelEdit() },
      "Cancel",
    );
    this.#state.replaceChildren("You are editing a message. Everything after it will be replaced. ", cancel);
    this.#state.hidden = false;
    this.#onEdit(index);
    this.#box.focus();
  }

  cancelEdit() {
    if (!this.#editing) return;
    this.#fill(this.#editing.draft);
    this.#endEdit();
    this.#box.focus();
  }

  /**
   * Restore the draft after a reload.
   * @param {string} name
   */
  #keepDraft(name) {
    try {
      this.#fill(sessionStorage.getItem(name) ?? "");
      addEventListener("pagehide", () =>
        sessionStorage.setItem(name, this.#editing?.draft ?? this.#box.value),
      );
    } catch {
      // The browser stores nothing for this page.
    }
  }

  async #submit() {
    const text = this.#box.value;
    const isSending = this.#box.readOnly; // for this chat, or for another one that was shown before
    if (this.#busy || isSending || text.trim() === "") return;
    const editing = this.#editing;
    this.#box.readOnly = true;
    const sent = this.#onSend(text, editing?.index ?? null);
    const accepted = await sent.finally(() => (this.#box.readOnly = false));
    if (!accepted) return;
    this.#fill(editing?.draft ?? "");
    if (editing) this.#endEdit();
  }

  #endEdit() {
    this.#editing = null;
    this.#state.hidden = true;
    this.#onEdit(null);
  }

  /** @param {KeyboardEvent} event */
  #keydown(event) {
    // While an input method composes a text, Enter accepts its suggestion; Safari reports that as key code 229.
    const composing = event.isComposing || event.keyCode === 229;
    if (event.key !== "Enter" || event.shiftKey || composing) return;
    event.preventDefault();
    void this.#submit();
  }

  /** @param {string} text */
  #fill(text) {
    this.#box.value = text;
    this.#fit();
  }

  #fit() {
    this.#box.style.height = "auto";
    const height = this.#box.scrollHeight; // 0 while the chat is not shown
    if (height) this.#box.style.height = `${height + 2}px`; // with its border
  }
}
