/**
 * Renders one text at a time. The last request comes first, because the reader sees the end of a dialogue.
 */

/** @typedef {(text: string) => Promise<string>} Render */

export class RenderQueue {
  #render;
  /** @type {(() => Promise<void>)[]} */
  #waiting = [];
  #isRunning = false;

  /** @param {Render} render */
  constructor(render) {
    this.#render = render;
  }

  /**
   * @param {string} text
   * @returns {Promise<string>}
   */
  render(text) {
    return new Promise((resolve, reject) => {
      this.#waiting.push(() => this.#render(text).then(resolve, reject));
      void this.#run();
    });
  }

  async #run() {
    if (this.#isRunning) return;
    this.#isRunning = true;
    await null; // so that all answers of a dialogue are waiting before the first one is taken
    for (let next = this.#waiting.pop(); next; next = this.#waiting.pop()) await next();
    this.#isRunning = false;
  }
}
