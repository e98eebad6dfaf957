/** The form with the model's inputs. It runs them, and shows the output and the request as programs. */

import { announce, byId, element } from "../common/dom.js";
import { ApiError, describe } from "../gateway/errors.js";
import { FieldForm } from "./field_form.js";
import { dismiss, notify } from "../common/notices.js";
import { OutputView } from "./output_view.js";
import { Run } from "../gateway/run.js";
import { changedInputs, errorsByField } from "./schema.js";
import { SnippetsView } from "./snippets_view.js";
import { hasEnded } from "../gateway/stream.js";

/**
 * @typedef {import("./schema.js").Field} Field
 * @typedef {import("../types.js").Prediction} Prediction
 */

export class InputsView {
  #api;
  #session;
  #output;
  #snippets = new SnippetsView(byId("snippets", HTMLElement));
  #runButton = byId("run", HTMLButtonElement);
  #stopButton = byId("stop-run", HTMLButtonElement);
  /** @type {Field[]} */
  #fields = [];
  /** @type {FieldForm | null} */
  #form = null;
  /** @type {Run | null} */
  #run = null;
  /** @type {string | null} the id of the prediction that is shown */
  #shown = null;
  /** @type {Record<string, unknown>} the inputs to show when the fields are known */
  #loaded = { prompt: "What is the capital of France?" };

  /**
   * @param {import("../gateway/api.js").Api} api
   * @param {import("../types.js").Session} session
   */
  constructor(api, session) {
    this.#api = api;
    this.#session = session;
    this.#output = new OutputView(byId("output", HTMLElement), session.prices, () => api.isServerReady());
    const form = byId("inputs-form", HTMLFormElement);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#start();
    });
    form.addEventListener("input", () => this.#showRequest());
    form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
    this.#stopButton.addEventListener("click", () => this.#run?.stop());
    byId("reset-inputs", HTMLButtonElement).addEventListener("click", () => this.#fill({}));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && isShown() && !document.querySelector("dialog[open]")) this.#run?.stop();
    });
    const hint = "The inputs appear when a server of the model is ready.";
    byId("inputs", HTMLElement).replaceChildren(element("p", { class: "hint" }, hint));
    this.#runButton.disabled = true;
    this.#showRequest();
  }

  /** @param {Field[]} fields the model's inputs */
  setFields(fields) {
    this.#fields = fields;
    this.#form = new FieldForm(fields, "input");
    byId("inputs", HTMLElement).replaceChildren(this.#form.element);
    this.#runButton.disabled = this.#run !== null;
    this.#fill(this.#loaded);
  }

  /** @param {string} id of a prediction, or "" to leave the form as it is */
  async open(id) {
    if (id === "" || id === this.#shown) return;
    if (this.#run) return notify("request", "A prediction is running. Stop it before you open another one.");
    this.#shown = id;
    try {
      await this.#load(id);
    } catch (error) {
      if (this.#shown !== id) return;
      this.#shown = null;
      const missing = error instanceof ApiError && error.status === 404;
      const reason = "There is no prediction with this id, or it belongs to another key.";
      this.#output.fail(missing ? reason : describe(error));
    }
  }

  /** @param {string} id */
  async #load(id) {
    const prediction = await this.#api.prediction(id);
    if (this.#shown !== id || this.#run) return; // another one was opened or started in the meantime
    this.#loaded = prediction.data_removed ? {} : prediction.input;
    this.#fill(this.#loaded);
    this.#output.begin();
    if (hasEnded(prediction)) this.#output.end(prediction);
    else await this.#follow(this.#newRun(), prediction);
  }

  async #start() {
    dismiss("request");
    const values = this.#form?.read();
    if (this.#run || !this.#form) return;
    if (!values) return this.#form.focusError();
    const errors = promptErrors(values);
    if (errors) {
      this.#form.showErrors(errors);
      return this.#form.focusError();
    }
    const run = this.#newRun();
    this.#shown = null;
    try {
      const prediction = await run.create(this.#session.model, changedInputs(this.#fields, values));
      this.#shown = prediction.id;
      this.#output.begin();
      if (isShown()) history.replaceState(null, "", `#/predictions/${prediction.id}`);
      byId("output-heading", HTMLElement).scrollIntoView({ block: "start" });
      await this.#follow(run, prediction);
    } catch (error) {
      this.#setRun(null);
      this.#problem(error);
    }
  }

  #newRun() {
    const run = new Run(this.#api, {
      onPiece: (piece) => this.#output.append(piece),
      onText: (text) => this.#output.set(text),
      onConnection: (connected) => this.#output.connection(connected),
      onStopFailed: (error) => notify("request", describe(error)),
    });
    this.#setRun(run);
    return run;
  }

  /**
   * @param {Run} run
   * @param {Prediction} prediction
   */
  async #follow(run, prediction) {
    try {
      const ended = await run.follow(prediction);
      this.#output.end(ended);
      announce(ended.status === "failed" ? `The prediction failed. ${ended.error ?? ""}` : "Output complete");
    } finally {
      this.#setRun(null);
    }
  }

  /** @param {Run | null} run */
  #setRun(run) {
    const hadFocus =
      document.activeElement === this.#runButton || document.activeElement === this.#stopButton;
    this.#run = run;
    this.#runButton.hidden = run !== null;
    this.#stopButton.hidden = run === null;
    this.#runButton.disabled = this.#form === null;
    // The bar with these buttons is always in view, but the browser would scroll to its place in the form.
    if (hadFocus) (run ? this.#stopButton : this.#runButton).focus({ preventScroll: true });
  }

  /** @param {unknown} error */
  #problem(error) {
    const invalid = error instanceof ApiError ? errorsByField(this.#fields, error.invalidFields) : null;
    if (!invalid || !Object.keys(invalid.byField).length) return notify("request", describe(error));
    this.#form?.showErrors(invalid.byField);
    this.#form?.focusError();
    if (invalid.others.length)
      notify("request", `The gateway refused the inputs: ${invalid.others.join("; ")}`);
  }

  /** @param {Record<string, unknown>} values */
  #fill(values) {
    this.#form?.fill(values);
    this.#showRequest();
  }

  #showRequest() {
    const base = new URL(".", document.baseURI).href.replace(/\/$/, "");
    const input = changedInputs(this.#fields, this.#form?.values ?? {});
    this.#snippets.show({ base, model: this.#session.model, needsKey: this.#session.needs_key, input });
  }
}

/**
 * The model answers either a prompt or messages. Its schema cannot say so.
 * @param {Record<string, unknown>} values
 * @returns {Record<string, string> | null} the errors by the names of the fields
 */
function promptErrors({ prompt, messages }) {
  const hasMessages = Array.isArray(messages) && messages.length > 0;
  if (prompt && hasMessages) return { messages: "Leave either prompt or messages empty." };
  if (!prompt && !hasMessages) return { prompt: "Enter a prompt, or messages below." };
  return null;
}

function isShown() {
  return !byId("inputs-view", HTMLElement).hidden;
}
