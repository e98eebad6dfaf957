/**
 * A dialogue and the prediction that answers it. Knows nothing about the DOM: a view that shows the conversation
 * sets `view` and is told what changes. Without a view, it continues, so that another dialogue can be shown meanwhile.
 */

import { inputsFor, titleFrom, withoutLastAnswer } from "./dialogue.js";
import { ApiError, describe } from "../gateway/errors.js";
import { Run } from "../gateway/run.js";
import { hasEnded, outputText } from "../gateway/stream.js";

/**
 * @typedef {import("../types.js").Dialogue} Dialogue
 * @typedef {import("../types.js").AnswerTurn} AnswerTurn
 * @typedef {import("../types.js").Prediction} Prediction
 *
 * @typedef {Object} View
 * @property {() => void} onTurns the list of turns has changed
 * @property {() => void} onBusy the conversation has begun to wait for an answer, or no longer waits
 * @property {(piece: string) => void} onPiece the last answer has become longer
 * @property {(text: string) => void} onText the last answer is this text
 * @property {(answer: AnswerTurn) => void} onEnd the last answer has ended
 * @property {(connected: boolean) => void} onConnection
 *
 * @typedef {Object} Dependencies
 * @property {import("../gateway/api.js").Api} api
 * @property {string} model
 * @property {() => string | null} defaultSystemPrompt null if it is not known
 * @property {(dialogue: Dialogue) => void} save must not throw
 * @property {(error: unknown) => void} report a request was refused
 */

const SECONDS_BETWEEN_SAVES = 1;

export class Conversation {
  /** @type {View | null} */
  #view = null;
  dialogue;
  #dependencies;
  /** @type {Run | null} */
  #run = null;
  #saveTimer = 0;

  /**
   * @param {Dialogue} dialogue
   * @param {Dependencies} dependencies
   */
  constructor(dialogue, dependencies) {
    this.dialogue = dialogue;
    this.#dependencies = dependencies;
  }

  get view() {
    return this.#view;
  }

  set view(view) {
    this.#view = view;
    this.#run?.setShown(view !== null);
  }

  get isBusy() {
    return this.#run !== null;
  }

  /**
   * Ask for an answer to a new message.
   * @param {string} text
   * @param {number} [from] the index of the turn that the message replaces, with all later ones
   * @returns {Promise<boolean>} whether the gateway has accepted it; otherwise nothing has changed
   */
  send(text, from = this.dialogue.turns.length) {
    return this.#ask([...this.dialogue.turns.slice(0, from), { role: "user", content: text }]);
  }

  /** Ask for another answer in place of the last one. */
  retry() {
    return this.#ask(withoutLastAnswer(this.dialogue.turns));
  }

  stop() {
    this.#run?.stop();
  }

  /**
   * Continue the last answer if the page was closed or lost its connection before the answer ended.
   * @param {boolean} again whether to try again with an answer that the page has lost
   */
  async resume(again) {
    const answer = this.dialogue.turns.at(-1);
    if (this.#run || answer?.role !== "assistant") return;
    const unfinished = ["starting", "processing", ...(again ? ["interrupted"] : [])];
    if (answer.isGone || !unfinished.includes(answer.status)) return;
    answer.status = "processing";
    const run = this.#begin(answer);
    try {
      await this.#follow(run, await this.#dependencies.api.prediction(answer.predictionId), answer);
    } catch (error) {
      answer.isGone = error instanceof ApiError && error.status === 404;
      this.#interrupt(answer, answer.isGone ? "The gateway no longer has this prediction." : describe(error));
    }
  }

  /** Store the dialogue now, even if it was stored a moment ago. */
  save() {
    clearTimeout(this.#saveTimer);
    this.#saveTimer = 0;
    this.dialogue.updated = Date.now();
    this.#dependencies.save(this.dialogue);
  }

  /** Store what has not been stored yet, because the page is being closed. */
  flush() {
    if (this.#saveTimer) this.save();
  }

  #saveSoon() {
    this.#saveTimer ||= setTimeout(() => this.save(), SECONDS_BETWEEN_SAVES * 1000);
  }

  /**
   * @param {import("../types.js").Turn[]} turns
   * @returns {Promise<boolean>}
   */
  async #ask(turns) {
    if (this.#run) return false;
    /** @type {AnswerTurn} */
    const answer = { role: "assistant", content: "", status: "starting", predictionId: "" };
    const run = this.#begin(answer);
    let prediction;
    try {
      const { model, defaultSystemPrompt } = this.#dependencies;
      prediction = await run.create(model, inputsFor(this.dialogue, turns, defaultSystemPrompt()));
    } catch (error) {
      this.#end();
      this.#dependencies.report(error);
      return false;
    }
    answer.predictionId = prediction.id;
    this.dialogue.turns = [...turns, answer];
    this.dialogue.title ||= titleFrom(turns[0]?.content ?? "");
    this.save();
    this.#view?.onTurns();
    void this.#follow(run, prediction, answer);
    return true;
  }

  /** @param {AnswerTurn} answer */
  #begin(answer) {
    /** @param {string} text */
    const grow = (text) => {
      answer.content = text;
      answer.status = "processing";
      this.#saveSoon();
    };
    this.#run = new Run(this.#dependencies.api, {
      onPiece: (piece, start) => {
        // After a reload, or when this chat is shown again, the stream begins with the first piece.
        const added = piece.slice(Math.max(0, answer.content.length - start));
        if (added === "") return;
        grow(answer.content + added);
        this.#view?.onPiece(added);
      },
      onText: (text) => {
        if (text.length <= answer.content.length) return;
        grow(text);
        this.#view?.onText(text);
      },
      onConnection: (connected) => this.#view?.onConnection(connected),
      onStopFailed: (error) => this.#dependencies.report(error),
    });
    this.#run.setShown(this.#view !== null);
    this.#view?.onBusy();
    return this.#run;
  }

  #end() {
    this.#run = null;
    this.#view?.onBusy();
  }

  /**
   * @param {Run} run
   * @param {Prediction} prediction
   * @param {AnswerTurn} answer
   */
  async #follow(run, prediction, answer) {
    try {
      const ended = hasEnded(prediction) ? prediction : await run.follow(prediction);
      if (!ended.data_removed) answer.content = outputText(ended);
      answer.status = ended.status;
      answer.error = ended.error;
      answer.metrics = ended.metrics ?? {};
      this.#finish(answer);
    } catch (error) {
      this.#interrupt(answer, describe(error));
    }
  }

  /**
   * @param {AnswerTurn} answer
   * @param {string} reason
   */
  #interrupt(answer, reason) {
    answer.status = "interrupted";
    answer.error = reason;
    this.#finish(answer);
  }

  /** @param {AnswerTurn} answer */
  #finish(answer) {
    this.save();
    this.#end();
    this.#view?.onEnd(answer);
  }
}
