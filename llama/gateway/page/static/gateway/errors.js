/** What the gateway refuses, as an Error and in words for the reader. Knows nothing about the DOM. */

/** @typedef {import("../types.js").InvalidField} InvalidField */

/** A response that is not a success, or (status 0) no response at all. */
export class ApiError extends Error {
  /**
   * @param {number} status 0 if the gateway could not be reached
   * @param {{title?: unknown, detail?: unknown, invalid_fields?: InvalidField[]}} problem a proxy's may be of any form
   * @param {number | null} retryAfter seconds
   */
  constructor(status, problem = {}, retryAfter = null) {
    const [title = "", detail = ""] = [problem.title, problem.detail].map((text) =>
      typeof text === "string" ? text : "",
    );
    super(detail || title || `HTTP ${status}`);
    this.status = status;
    this.title = title;
    this.detail = detail;
    const fields = Array.isArray(problem.invalid_fields) ? problem.invalid_fields : [];
    this.invalidFields = fields.filter((one) => typeof one?.field === "string");
    this.retryAfter = retryAfter;
  }

  /** Whether the same request may succeed a little later. */
  get isTemporary() {
    return this.status === 0 || this.status === 429 || this.status >= 500;
  }
}

/**
 * Say what happened and what to do.
 * @param {unknown} error
 * @returns {string}
 */
export function describe(error) {
  if (!(error instanceof ApiError)) return `The page failed: ${String(error)}. Reload it and try again.`;
  const detail = error.detail.trim();
  switch (error.status) {
    case 0:
      return "The gateway could not be reached. Check that it is running, then try again.";
    case 401:
      return "You are not logged in. Try again, and enter your key.";
    case 402:
      return detail || "The budget of this key is used up.";
    case 413:
      return `The request is too large. ${detail}`.trim();
    case 422:
      return `The gateway refused the inputs: ${withoutDashes(detail)}`;
    case 429:
      return `${detail || "Too many requests."} ${tryAgain(error.retryAfter)}`;
    case 502:
    case 504:
      return `The gateway did not respond in time (HTTP ${error.status}). Try again.`;
  }
  const reason = [error.title, detail].filter(Boolean).join(": ") || "No reason was given";
  return `${reason} (HTTP ${error.status}).`.replace(/\.? \(HTTP/, " (HTTP");
}

/** @param {number | null} seconds */
function tryAgain(seconds) {
  if (seconds === null) return "Try again later.";
  return `Try again in ${seconds} ${seconds === 1 ? "second" : "seconds"}.`;
}

/** @param {string} detail a list of lines that start with a dash */
function withoutDashes(detail) {
  return detail.replace(/^- /, "").replaceAll("\n- ", "; ") || "an input is invalid.";
}
