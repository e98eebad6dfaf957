/**
 * Follows a prediction to its end: reads its event stream, then polls the prediction until it has ended.
 *
 * EventSource reconnects by itself and names the last event that it has seen.
 */

import { ApiError } from "./errors.js";

/**
 * @typedef {import("../types.js").Prediction} Prediction
 *
 * @typedef {Object} Listener
 * @property {(piece: string) => void} onPiece a new piece of the output
 * @property {(text: string) => void} onText the whole output so far, which replaces the pieces
 * @property {(connected: boolean) => void} onConnection
 */

const SECONDS_WITHOUT_CONNECTION = 30;
const MAX_FAILURES = 15; // of polling in a row, about half a minute
const MAX_FAILURES_AT_END = 2; // if the stream has said how the prediction ended
/** @type {Record<string, Prediction["status"]>} */
const STATUS_OF_REASON = { error: "failed", canceled: "canceled" };

/** @param {Prediction} prediction */
export function hasEnded(prediction) {
  return !["starting", "processing"].includes(prediction.status);
}

/** @param {Prediction} prediction */
export function outputText(prediction) {
  return Array.isArray(prediction.output) ? prediction.output.join("") : (prediction.output ?? "");
}

/**
 * @param {import("./api.js").Api} api
 * @param {Prediction} prediction
 * @param {Listener} listener
 * @returns {Promise<Prediction>} as it is after its end
 */
export async function follow(api, prediction, listener) {
  const token = prediction.urls.stream?.split("/").pop();
  const read = !hasEnded(prediction) && token ? await readStream(token, listener) : { text: "", end: null };
  const maxFailures = read.end ? MAX_FAILURES_AT_END : MAX_FAILURES;
  try {
    return await untilEnded(api, prediction.id, listener, maxFailures);
  } catch (problem) {
    if (!read.end || !(problem instanceof ApiError && problem.isTemporary)) throw problem;
    // A gateway that is being stopped has reported the end in the stream, and accepts no more requests.
    return { ...prediction, ...read.end, output: read.text };
  }
}

/**
 * Resolves after the event `done`, or when the stream is lost for good.
 * @param {string} token
 * @param {Listener} listener
 * @returns {Promise<{text: string, end: Pick<Prediction, "status" | "error"> | null}>} the output, and how the
 * prediction ended; null if the stream was lost before
 */
function readStream(token, listener) {
  return new Promise((resolve) => {
    const source = new EventSource(`v1/stream/${token}`);
    let count = 0;
    let timer = 0;
    let text = "";
    /** @type {string | null} */
    let error = null;

    /** @param {Pick<Prediction, "status" | "error"> | null} end */
    const close = (end) => {
      clearTimeout(timer);
      source.close();
      resolve({ text, end });
    };
    source.addEventListener("open", () => {
      clearTimeout(timer);
      timer = 0;
      listener.onConnection(true);
    });
    source.addEventListener("output", (event) => {
      const index = Number(event.lastEventId.split(":")[1]);
      if (index < count) return; // sent again after a reconnect
      count = index + 1;
      text += event.data;
      listener.onPiece(event.data);
    });
    source.addEventListener("done", (event) => {
      const status = STATUS_OF_REASON[JSON.parse(event.data).reason] ?? "succeeded";
      close({ status, error });
    });
    source.addEventListener("error", (event) => {
      if (event instanceof MessageEvent) {
        error = JSON.parse(event.data).detail; // the prediction has failed; `done` follows
        return;
      }
      if (source.readyState === EventSource.CLOSED) return close(null);
      listener.onConnection(false);
      timer ||= setTimeout(() => close(null), SECONDS_WITHOUT_CONNECTION * 1000);
    });
  });
}

/**
 * @param {import("./api.js").Api} api
 * @param {string} id
 * @param {Listener} listener
 * @param {number} maxFailures in a row
 * @returns {Promise<Prediction>}
 */
async function untilEnded(api, id, listener, maxFailures) {
  let failures = 0;
  for (let wait = 200; ; wait = Math.min(wait * 1.5, 2000)) {
    try {
      const prediction = await api.prediction(id);
      failures = 0;
      listener.onConnection(true);
      listener.onText(outputText(prediction));
      if (hasEnded(prediction)) return prediction;
    } catch (error) {
      if (!(error instanceof ApiError && error.isTemporary) || ++failures > maxFailures) throw error;
      listener.onConnection(false);
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}
