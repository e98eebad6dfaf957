/** The chat: shows one conversation, keeps the others that are still being answered, and stores all of them. */

import { Autoscroll } from "./autoscroll.js";
import { ChatSettings } from "./chat_settings.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { newDialogue } from "./dialogue.js";
import { DialogueList } from "./dialogue_list.js";
import { browserStorage, DialogueStorage } from "./dialogue_storage.js";
import { announce, byId } from "../common/dom.js";
import { ApiError, describe } from "../gateway/errors.js";
import { dismiss, notify } from "../common/notices.js";
import { Panel } from "../common/panel.js";
import { RenderQueue } from "../answer/render_queue.js";
import { routeOf } from "../router.js";
import { SavedDialogues } from "./saved_dialogues.js";
import { errorsByField } from "../inputs/schema.js";
import { TurnList } from "./turn_list.js";

/**
 * @typedef {import("../types.js").Dialogue} Dialogue
 * @typedef {import("../inputs/schema.js").Field} Field
 */

export class ChatView {
  #api;
  #session;
  #archive;
  #settings;
  #composer;
  #list;
  #turns;
  #scroll;
  #chatsPanel;
  /** @type {Field[]} */
  #fields = [];
  /** @type {Map<string, Conversation>} the one that is shown, and those that were left during an answer */
  #conversations = new Map();
  /** @type {Conversation} */
  #current;

  /**
   * @param {import("../gateway/api.js").Api} api
   * @param {import("../types.js").Session} session
   * @param {string} owner whose chats are shown: a part of the names under which the browser stores them
   */
  constructor(api, session, owner) {
    this.#api = api;
    this.#session = session;
    const store = new DialogueStorage(browserStorage(), owner);
    this.#archive = new SavedDialogues(store, () => this.#showList());
    this.#settings = new ChatSettings(() => this.#settingsChanged());
    this.#composer = new Composer(`llama:draft:${owner}`, {
      onSend: (text, index) => this.#send(text, index),
      onStop: () => this.#current.stop(),
      onEdit: (index) => this.#turns.markEdited(index),
    });
    this.#list = new DialogueList({
      onNew: () => this.#openNew(),
      onRename: (title) => this.#rename(title),
      onDelete: () => this.#delete(),
    });
    this.#turns = new TurnList(
      session.notice,
      { api, prices: session.prices, rendering: new RenderQueue((text) => api.markdown(text)) },
      {
        onEdit: (index) => this.#composer.edit(index, this.#turns.text(index)),
        onRetry: () => this.#retry(),
        onExample: (text) => this.#composer.fill(text),
      },
    );
    const latest = byId("to-latest", HTMLButtonElement);
    this.#scroll = new Autoscroll(byId("conversation", HTMLElement), byId("turns", HTMLElement), latest);
    this.#chatsPanel = connectPanel("chats", { wide: "(min-width: 56rem)", isOpen: true });
    connectPanel("settings", { wide: "(min-width: 75rem)", isOpen: false });
    this.#current = this.#conversation(newDialogue());
    document.addEventListener("keydown", (event) => this.#keydown(event));
    addEventListener("storage", (event) => this.#changedElsewhere(event.key));
    addEventListener("pagehide", () => this.#conversations.forEach((conversation) => conversation.flush()));
  }

  /** The address of what is shown. */
  get address() {
    return this.#current.dialogue.turns.length ? `#/chat/${this.#current.dialogue.id}` : "#/chat";
  }

  /** @param {Field[]} fields the model's inputs */
  setFields(fields) {
    this.#fields = fields;
    this.#settings.setFields(fields);
  }

  /** @param {string} id of a dialogue, or "" for a new one */
  open(id) {
    this.#chatsPanel.close();
    const isShown = this.#current.view !== null && this.address === (id ? `#/chat/${id}` : "#/chat");
    if (isShown) return this.#composer.focus();
    const stored = id ? this.#archive.get(id) : null;
    if (id && !stored && !this.#conversations.has(id))
      notify("chat", "This chat is not stored in this browser.");
    const dialogue = stored ?? newDialogue();
    this.#show(this.#conversations.get(id) ?? this.#conversation(dialogue));
    this.#composer.focus();
  }

  /** @param {Dialogue} dialogue */
  #conversation(dialogue) {
    return new Conversation(dialogue, {
      api: this.#api,
      model: this.#session.model,
      defaultSystemPrompt: () => this.#settings.defaultSystemPrompt,
      save: (changed) => this.#archive.save(changed),
      report: (error) => this.#problem(error, dialogue),
    });
  }

  /**
   * @param {Conversation} conversation
   * @param {boolean} [again] whether to try again with an answer that the page has lost
   */
  #show(conversation, again = true) {
    const previous = this.#current;
    previous.view = null;
    if (!previous.isBusy) this.#conversations.delete(previous.dialogue.id);
    this.#composer.cancelEdit();
    this.#list.cancelEdit();
    this.#current = conversation;
    this.#conversations.set(conversation.dialogue.id, conversation);
    conversation.view = this.#viewOf(conversation);
    this.#settings.show(conversation.dialogue);
    this.#turns.show(conversation.dialogue.turns, conversation.isBusy);
    this.#composer.setBusy(conversation.isBusy);
    this.#scroll.follow();
    this.#showList();
    void conversation.resume(again);
  }

  /**
   * @param {Conversation} conversation
   * @returns {import("./conversation.js").View}
   */
  #viewOf(conversation) {
    return {
      onTurns: () => {
        this.#turns.show(conversation.dialogue.turns, conversation.isBusy);
        if (routeOf(location.hash).view === "chat") history.replaceState(null, "", this.address);
        this.#scroll.follow();
      },
      onBusy: () => {
        this.#composer.setBusy(conversation.isBusy);
        this.#turns.allow(conversation.isBusy);
      },
      onPiece: (piece) => this.#turns.lastAnswer?.append(piece),
      onText: (text) => this.#turns.lastAnswer?.set(text),
      onConnection: (connected) => this.#turns.lastAnswer?.connection(connected),
      onEnd: (answer) => {
        this.#turns.lastAnswer?.end();
        const failed = answer.status === "failed" || answer.status === "interrupted";
        if (failed) announce(`The answer failed. ${answer.error ?? ""}`);
        else announce(answer.status === "canceled" ? "Answer stopped" : "Answer complete");
      },
    };
  }

  /**
   * @param {string} text
   * @param {number | null} index
   */
  async #send(text, index) {
    dismiss("chat");
    return this.#areSettingsValid() && this.#current.send(text, index ?? undefined);
  }

  #retry() {
    if (!this.#areSettingsValid()) return;
    this.#composer.cancelEdit();
    void this.#current.retry();
  }

  #areSettingsValid() {
    dismiss("request");
    const invalid = this.#settings.invalid();
    if (invalid.length) notify("request", `Correct ${invalid.join(", ")} in Settings, then try again.`);
    return invalid.length === 0;
  }

  /**
   * @param {unknown} error
   * @param {Dialogue} dialogue whose request was refused
   */
  #problem(error, dialogue) {
    notify("request", describe(error));
    if (error instanceof ApiError && dialogue === this.#current.dialogue)
      this.#settings.showErrors(errorsByField(this.#fields, error.invalidFields).byField);
  }

  #openNew() {
    if (location.hash === "#/chat") this.open("");
    location.hash = "#/chat";
  }

  /** @param {string} title */
  #rename(title) {
    this.#current.dialogue.title = title;
    this.#archive.save(this.#current.dialogue);
  }

  #settingsChanged() {
    if (this.#current.dialogue.turns.length) this.#archive.save(this.#current.dialogue);
  }

  #delete() {
    const { dialogue } = this.#current;
    this.#current.stop();
    this.#archive.delete(dialogue);
    this.#openNew();
  }

  #showList() {
    this.#list.show(this.#archive.summaries, this.#current.dialogue);
    byId("views", HTMLElement).querySelector('[data-view="chat"]')?.setAttribute("href", this.address);
  }

  /** @param {string | null} itemName of the storage, which another tab has changed */
  #changedElsewhere(itemName) {
    const id = this.#archive.changedElsewhere(itemName);
    if (id === null || this.#conversations.get(id)?.isBusy) return;
    this.#conversations.delete(id); // what is in the storage now is newer
    if (id !== this.#current.dialogue.id) return;
    const stored = this.#archive.get(id);
    // Two tabs that cannot get an answer would otherwise tell each other to try again, without end.
    if (stored) this.#show(this.#conversation(stored), false);
  }

  /** @param {KeyboardEvent} event */
  #keydown(event) {
    if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
    if (byId("chat-view", HTMLElement).hidden) return;
    if (this.#composer.isEditing) this.#composer.cancelEdit();
    else this.#current.stop();
  }
}

/**
 * @param {string} name
 * @param {{wide: string, isOpen: boolean}} options
 */
function connectPanel(name, options) {
  return new Panel(byId(`${name}-panel`, HTMLElement), byId(`${name}-toggle`, HTMLButtonElement), options);
}
