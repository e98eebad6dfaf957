/** A panel beside the chat: a column on a wide screen, and a drawer over the page on a narrow one. */

import { element } from "./dom.js";

export class Panel {
  #panel;
  #toggle;
  #wide;
  #isOpen;
  #place = document.createComment("panel");
  #drawer;

  /**
   * @param {HTMLElement} panel
   * @param {HTMLButtonElement} toggle
   * @param {{wide: string, isOpen: boolean}} options a media query, and whether the column is open at first
   */
  constructor(panel, toggle, { wide, isOpen }) {
    this.#panel = panel;
    this.#toggle = toggle;
    this.#wide = matchMedia(wide);
    this.#isOpen = isOpen;
    panel.before(this.#place);
    const close = element(
      "button",
      { type: "button", class: "quiet close", click: () => this.close() },
      "Close",
    );
    const label = panel.getAttribute("aria-label");
    this.#drawer = element("dialog", { class: "drawer", "aria-label": label }, close);
    this.#drawer.addEventListener("click", (event) => {
      if (event.target === this.#drawer) this.close(); // a click beside it
    });
    this.#drawer.addEventListener("close", () => this.#update());
    document.body.append(this.#drawer);
    toggle.addEventListener("click", () => this.#switch());
    this.#wide.addEventListener("change", () => this.#arrange());
    this.#arrange();
  }

  /** Close the drawer. A column stays. */
  close() {
    this.#drawer.close();
  }

  #switch() {
    if (this.#wide.matches) this.#isOpen = !this.#isOpen;
    else this.#drawer.showModal();
    this.#update();
  }

  #arrange() {
    this.#drawer.close();
    if (this.#wide.matches) this.#place.after(this.#panel);
    else this.#drawer.append(this.#panel);
    this.#update();
  }

  #update() {
    const isWide = this.#wide.matches;
    this.#panel.hidden = isWide && !this.#isOpen;
    this.#toggle.setAttribute("aria-expanded", String(isWide ? this.#isOpen : this.#drawer.open));
  }
}
