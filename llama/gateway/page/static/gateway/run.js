/** One prediction, from the request that creates it to its end. It can be stopped at any time. */

import { follow } from "./stream.js";

/** @typedef {import("../types.js").Prediction} Prediction */

export class Run {
  #api;
  #listener;
  /** @type {string | null} */
  #id = null;
  #stopped = false;
  #isShown = true;
  #changed = new AbortController();

  /**
   * @param {import("./api.js").Api} api
   * @param {import("./stream.js").Listener & {onStopFailed: (error: unknown) => void}} listener
   */
  constructor(api, listener) {
    this.#api = api;
    this.#listener = listener;
  }

  /**
   * @param {string} model
   * @param {Record<string, unknown>} input
   * @returns {Promise<Prediction>}
   */
  async create(model, input) {
    const prediction = await this.#api.create(model, input);
    this.#id = prediction.id;
    if (this.#stopped) void this.#cancel(prediction.id);
    return prediction;
  }

  /**
   * @param {Prediction} prediction
   * @returns {Promise<Prediction>} as it is after its end
   */
  follow(prediction) {
    this.#id = prediction.id;
    const showing = () => ({ isShown: this.#isShown, changed: this.#changed.signal });
    return follow(this.#api, prediction, this.#listener, showing);
  }

  /** @param {boolean} isShown whether the output is shown: then it is streamed, otherwise it is polled */
  setShown(isShown) {
    if (isShown === this.#isShown) return;
    this.#isShown = isShown;
    this.#changed.abort();
    this.#changed = new AbortController();
  }

  /** Cancel the prediction; one that is still being created is cancelled as soon as its id is known. */
  stop() {
    this.#stopped = true;
    if (this.#id) void this.#cancel(this.#id);
  }

  /** @param {string} id */
  async #cancel(id) {
    try {
      await this.#api.cancel(id);
    } catch (error) {
      this.#listener.onStopFailed(error);
    }
  }
}
