/**
 * Follows a prediction to its end: reads its event stream while its output is shown, and polls it otherwise.
 *
 * A stream occupies a connection, and a browser opens only six HTTP/1.1 connections to a host, for all tabs together.
 * EventSource reconnects by itself and names the last event that it has seen.
 */

import { ApiError } from "./errors.js";

/**
 * @typedef {import("../types.js").Prediction} Prediction
 *
 * @typedef {Object} Listener
 * @property {(piece: string, start: number) => void} onPiece a piece of the output, and the length of what is before
 * it; a stream that is opened again begins with the first piece
 * @property {(text: string) => void} onText the whole output so far, which replaces the pieces
 * @property {(connected: boolean) => void} onConnection
 *
 * @typedef {{isShown: boolean, changed: AbortSignal}} Showing whether the output is shown, until `changed` is aborted
 *
 * @typedef {Object} Read what a stream has said
 * @property {string} text the output
 * @property {Pick<Prediction, "status" | "error"> | null} end how the prediction ended; null if the stream was lost
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
 * @param {() => Showing} showing
 * @returns {Promise<Prediction>} as it is after its end
 */
export async function follow(api, prediction, listener, showing) {
  const token = hasEnded(prediction) ? undefined : prediction.urls.stream?.split("/").pop();
  /** @type {Read | null} */
  let read = null;
  let failures = 0;
  for (let wait = 200; ; wait = Math.min(wait * 1.5, 2000)) {
    const { isShown, changed } = showing();
    if (token && isShown && !read) read = await readStream(token, listener, changed);
    try {
      const current = await api.prediction(prediction.id);
      failures = 0;
      listener.onConnection(true);
      listener.onText(outputText(current));
      if (hasEnded(current)) return current;
    } catch (error) {
      if (!(error instanceof ApiError && error.isTemporary)) throw error;
      // A gateway that is being stopped has reported the end in the stream, and accepts no more requests.
      if (read?.end && failures >= MAX_FAILURES_AT_END)
        return { ...prediction, ...read.end, output: read.text };
      if (++failures > MAX_FAILURES) throw error;
      listener.onConnection(false);
    }
    await pause(wait, changed);
  }
}

/**
 * Resolves after the event `done`, or when the stream is lost for good, or with null when `left` is aborted.
 * @param {string} token
 * @param {Listener} listener
 * @param {AbortSignal} left
 * @returns {Promise<Read | null>}
 */
function readStream(token, listener, left) {
  return new Promise((resolve) => {
    const source = new EventSource(`v1/stream/${token}`);
    let count = 0;
    let timer = 0;
    let text = "";
    /** @type {string | null} */
    let error = null;

    /** @param {Read | null} read */
    const close = (read) => {
      clearTimeout(timer);
      source.close();
      resolve(read);
    };
    left.addEventListener("abort", () => close(null));
    source.addEventListener("open", () => {
      clearTimeout(timer);
      timer = 0;
      listener.onConnection(true);
    });
    source.addEventListener("output", (event) => {
      const index = Number(event.lastEventId.split(":")[1]);
      if (index < count) return; // sent again after a reconnect
      count = index + 1;
      listener.onPiece(event.data, text.length);
      text += event.data;
    });
    source.addEventListener("done", (event) => {
      const status = STATUS_OF_REASON[JSON.parse(event.data).reason] ?? "succeeded";
      close({ text, end: { status, error } });
    });
    source.addEventListener("error", (event) => {
      if (event instanceof MessageEvent) {
        error = JSON.parse(event.data).detail; // the prediction has failed; `done` follows
        return;
      }
      if (source.readyState === EventSource.CLOSED) return close({ text, end: null });
      listener.onConnection(false);
      timer ||= setTimeout(() => close({ text, end: null }), SECONDS_WITHOUT_CONNECTION * 1000);
    });
  });
}

/**
 * @param {number} milliseconds
 * @param {AbortSignal} changed it ends the pause
 */
function pause(milliseconds, changed) {
  if (changed.aborted) return;
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      changed.removeEventListener("abort", end);
      resolve(undefined);
    };
    const timer = setTimeout(end, milliseconds);
    changed.addEventListener("abort", end);
  });
}
