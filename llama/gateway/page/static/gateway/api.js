/**
 * The gateway's HTTP API. All URLs are relative, so that the page works below a path prefix.
 *
 * A request without a valid login asks for the key and is then sent again, so no caller handles 401. Markdown is
 * an exception: text can stay plain, which is no reason to ask.
 */

import { ApiError } from "./errors.js";

/** @typedef {import("../types.js").Prediction} Prediction */

export class Api {
  #askForKey;
  /** @type {Promise<boolean> | null} */
  #asking = null;

  /** @param {() => Promise<boolean>} askForKey resolves with whether there is a new login */
  constructor(askForKey) {
    this.#askForKey = askForKey;
  }

  /** @returns {Promise<import("../types.js").Session>} */
  session() {
    return send("GET", "page/session");
  }

  /** @param {string} key */
  login(key) {
    return send("POST", "page/login", { key });
  }

  logout() {
    return send("POST", "page/logout");
  }

  /**
   * @param {string} since a day, or "" for the beginning of the month
   * @returns {Promise<import("../types.js").UsageReport>}
   */
  usage(since) {
    return this.#authorized("GET", `page/usage${since ? `?since=${encodeURIComponent(since)}` : ""}`);
  }

  /**
   * @param {string} text
   * @returns {Promise<string>} HTML that the gateway has sanitised
   */
  async markdown(text) {
    return (await send("POST", "page/markdown", { text })).html;
  }

  /**
   * @param {string} name
   * @returns {Promise<unknown>} the model's OpenAPI document, or null if no server has been ready yet
   */
  async schema(name) {
    const model = await this.#authorized("GET", `v1/models/${name}`);
    return model.latest_version?.openapi_schema ?? null;
  }

  /**
   * @param {string} model
   * @param {Record<string, unknown>} input
   * @returns {Promise<Prediction>}
   */
  create(model, input) {
    return this.#authorized("POST", `v1/models/${model}/predictions`, { input });
  }

  /**
   * @param {string} id
   * @returns {Promise<Prediction>}
   */
  prediction(id) {
    return this.#authorized("GET", `v1/predictions/${encodeURIComponent(id)}`);
  }

  /** @returns {Promise<boolean>} false only if the gateway says that no server of the model is ready */
  async isServerReady() {
    const response = await fetch("readyz", { cache: "no-store" }).catch(() => null);
    const health = await response?.json().catch(() => null);
    return health?.ready !== 0;
  }

  /** @param {string} id */
  cancel(id) {
    return this.#authorized("POST", `v1/predictions/${encodeURIComponent(id)}/cancel`);
  }

  /**
   * @param {string} method
   * @param {string} path
   * @param {object} [body]
   */
  async #authorized(method, path, body) {
    try {
      return await send(method, path, body);
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 401) throw error;
      // Several requests may fail at once, and one login serves all of them.
      this.#asking ??= this.#askForKey().finally(() => (this.#asking = null));
      if (!(await this.#asking)) throw error;
      return await send(method, path, body);
    }
  }
}

/**
 * @param {string} method
 * @param {string} path
 * @param {object} [body]
 * @returns {Promise<any>} the response's JSON, or null
 */
async function send(method, path, body) {
  const response = await fetch(path, {
    method,
    cache: "no-store",
    ...(body && { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) }),
  }).catch(() => {
    throw new ApiError(0);
  });
  // A proxy may answer with something other than JSON, and a response may break off.
  const content = await response.json().catch(() => null);
  if (response.ok) {
    if (content === null && response.status !== 204) throw new ApiError(0);
    return content;
  }
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  throw new ApiError(response.status, content ?? {}, Number.isNaN(seconds) ? null : seconds);
}
