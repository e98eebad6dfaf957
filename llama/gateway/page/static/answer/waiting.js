/** What an answer without any text waits for: the first token, or a server of the model. */

const FIRST_TOKEN = "Waiting for the first token …";
const SERVER = "No server of the model is ready. The answer begins when one is.";
const SECONDS_BETWEEN_CHECKS = 5;

export class Waiting {
  #line;
  #isServerReady;
  #show;
  #timer = 0;

  /**
   * @param {HTMLElement} line it stops when this element has been removed from the page
   * @param {() => Promise<boolean>} isServerReady
   * @param {(text: string) => void} show
   */
  constructor(line, isServerReady, show) {
    this.#line = line;
    this.#isServerReady = isServerReady;
    this.#show = show;
  }

  /** Say what the answer waits for, until `stop` is called. */
  start() {
    if (this.#timer) return;
    this.#timer = setInterval(() => this.#check(), SECONDS_BETWEEN_CHECKS * 1000);
    this.#show(FIRST_TOKEN);
  }

  stop() {
    clearInterval(this.#timer);
    this.#timer = 0;
  }

  async #check() {
    if (!this.#line.isConnected) return this.stop();
    const timer = this.#timer;
    const isReady = await this.#isServerReady();
    if (timer === this.#timer) this.#show(isReady ? FIRST_TOKEN : SERVER);
  }
}
