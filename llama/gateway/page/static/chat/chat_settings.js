/** The settings of a chat: its system prompt, and the inputs that control how answers are sampled. */

import { byId, element } from "../common/dom.js";
import { FieldForm } from "../inputs/field_form.js";
import { changedInputs } from "../inputs/schema.js";

/**
 * @typedef {import("../inputs/schema.js").Field} Field
 * @typedef {import("../types.js").Dialogue} Dialogue
 */

/** The chat sets these itself, or they are of no use in a chat. */
const NOT_SHOWN = [
  ...["prompt", "messages", "system_prompt", "prompt_template", "log_performance_metrics"],
  ...["max_tokens", "min_tokens", "replicate_weights"],
];

export class ChatSettings {
  #toggle = byId("settings-toggle", HTMLButtonElement);
  #system = element("textarea", { id: "system-prompt", rows: 4, "aria-describedby": "system-prompt-hint" });
  /** @type {Field[]} */
  #fields = [];
  /** @type {FieldForm | null} */
  #form = null;
  /** @type {Dialogue | null} */
  #dialogue = null;

  /** @param {() => void} onChange */
  constructor(onChange) {
    const root = byId("chat-settings", HTMLElement);
    root.addEventListener("input", () => {
      this.#store();
      onChange();
    });
    this.#build(root);
  }

  /** @type {string | null} the model's own system prompt; null while its inputs are not known */
  defaultSystemPrompt = null;

  /** @param {Field[]} fields the model's inputs */
  setFields(fields) {
    const system = fields.find((field) => field.name === "system_prompt");
    this.defaultSystemPrompt = String(system?.default ?? "");
    this.#fields = fields.filter((field) => !field.deprecated && !NOT_SHOWN.includes(field.name));
    this.#form = new FieldForm(this.#fields, "setting");
    this.#build(byId("chat-settings", HTMLElement));
    if (this.#dialogue) this.show(this.#dialogue);
  }

  /** @param {Dialogue} dialogue */
  show(dialogue) {
    this.#dialogue = dialogue;
    this.#system.value = dialogue.systemPrompt ?? this.defaultSystemPrompt ?? "";
    this.#form?.fill(dialogue.settings);
    this.#count();
  }

  /**
   * Show the errors of the settings.
   * @returns {string[]} the names of the settings that are not valid
   */
  invalid() {
    return this.#form?.read() === null ? this.#form.invalid : [];
  }

  /** @param {Record<string, string>} errors of the gateway, by the name of the input */
  showErrors(errors) {
    this.#form?.showErrors(errors);
  }

  #store() {
    if (!this.#dialogue) return;
    const isDefault = this.#system.value === (this.defaultSystemPrompt ?? "");
    this.#dialogue.systemPrompt = isDefault ? null : this.#system.value;
    if (this.#form) {
      this.#form.read();
      this.#dialogue.settings = changedInputs(this.#fields, this.#form.values);
    }
    this.#count();
  }

  #count() {
    if (!this.#dialogue) return;
    const { settings, systemPrompt } = this.#dialogue;
    const changed = Object.keys(settings).length + (systemPrompt === null ? 0 : 1);
    this.#toggle.textContent = changed ? `Settings (${changed} changed)` : "Settings";
  }

  /** @param {HTMLElement} root */
  #build(root) {
    const reset = () => {
      if (!this.#dialogue) return;
      Object.assign(this.#dialogue, { systemPrompt: null, settings: {} });
      this.show(this.#dialogue);
      root.dispatchEvent(new Event("input"));
    };
    root.replaceChildren(
      element(
        "div",
        { class: "field wide-field" },
        element("label", { for: "system-prompt" }, "System prompt"),
        this.#system,
        element(
          "p",
          { class: "hint", id: "system-prompt-hint" },
          "How the model should behave. Leave it empty for none.",
        ),
      ),
      this.#form?.element ??
        element("p", { class: "hint" }, "The other settings appear when a server of the model is ready."),
      element("button", { type: "button", click: reset }, "Use the defaults"),
    );
  }
}
