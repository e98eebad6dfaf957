/** Keeps a scrolled element at its end while it grows, unless the reader has scrolled away from the end. */

const NEAR = 48; // pixels

export class Autoscroll {
  #scroller;
  #button;
  #following = true;

  /**
   * @param {HTMLElement} scroller
   * @param {HTMLElement} content
   * @param {HTMLButtonElement} button goes to the end
   */
  constructor(scroller, content, button) {
    this.#scroller = scroller;
    this.#button = button;
    let height = 0;
    scroller.addEventListener("scroll", () => {
      // A scroll that only follows from a change of the height says nothing about the reader.
      if (scroller.scrollHeight === height || this.#isAtEnd) this.#following = this.#isAtEnd;
      this.#update();
    });
    const resized = new ResizeObserver(() => {
      height = scroller.scrollHeight;
      if (this.#following) this.#toEnd();
      this.#update();
    });
    resized.observe(content);
    resized.observe(scroller);
    button.addEventListener("click", () => {
      this.follow();
      scroller.focus({ preventScroll: true });
    });
  }

  /** Go to the end and stay there. */
  follow() {
    this.#following = true;
    this.#toEnd();
    this.#update();
  }

  get #isAtEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR;
  }

  #toEnd() {
    this.#scroller.scrollTop = this.#scroller.scrollHeight;
  }

  #update() {
    this.#button.hidden = this.#following;
  }
}
