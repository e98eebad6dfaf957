/**
 * The types of what the gateway sends and of what the page stores. No module imports this file at run time.
 *
 * @typedef {{input: number, output: number}} Prices Dollars per million tokens.
 * @typedef {{key: string | null, needs_key: boolean, model: string, notice: string | null, prices: Prices}} Session
 *
 * @typedef {"starting" | "processing" | "succeeded" | "failed" | "canceled"} Status
 *
 * @typedef {Object} Metrics
 * @property {number} [input_token_count]
 * @property {number} [output_token_count]
 * @property {number} [time_to_first_token] Seconds from the start on a server.
 * @property {number} [tokens_per_second]
 * @property {number} [predict_time] Seconds from the start on a server to the end.
 * @property {number} [total_time] Seconds from the creation to the end.
 * @property {string} [finish_reason]
 *
 * @typedef {Object} Prediction
 * @property {string} id
 * @property {Status} status
 * @property {Record<string, unknown>} input
 * @property {string[] | string | null} output
 * @property {string | null} logs
 * @property {string | null} error
 * @property {boolean} data_removed
 * @property {{stream?: string}} urls
 * @property {Metrics} [metrics]
 * @property {string} [created_at]
 *
 * @typedef {{field: string, description: string, type?: string}} InvalidField
 *
 * @typedef {Object} UsageCounts
 * @property {number} predictions
 * @property {number} input_tokens
 * @property {number} output_tokens
 * @property {number} seconds
 * @property {number} price Dollars.
 *
 * @typedef {UsageCounts & {day: string, model: string}} UsageRow
 *
 * @typedef {Object} Budget
 * @property {number | null} tokens
 * @property {number | null} dollars
 * @property {number} tokens_used
 * @property {number} dollars_used
 *
 * @typedef {{since: string, rows: UsageRow[], total: UsageCounts, budget: Budget | null}} UsageReport
 *
 * @typedef {{role: "user", content: string}} UserTurn
 *
 * @typedef {Object} AnswerTurn
 * @property {"assistant"} role
 * @property {string} content The text so far.
 * @property {Status | "interrupted"} status "interrupted": the page lost the prediction before its end.
 * @property {string} predictionId
 * @property {string | null} [error]
 * @property {boolean} [isGone] Whether the gateway no longer has the prediction.
 * @property {Metrics} [metrics]
 *
 * @typedef {UserTurn | AnswerTurn} Turn
 *
 * @typedef {Object} Dialogue
 * @property {string} id
 * @property {string} title Empty until the first message is sent or a title is given.
 * @property {number} updated Unix time in milliseconds.
 * @property {string | null} systemPrompt Null: the model's default.
 * @property {Record<string, unknown>} settings The inputs that differ from the model's defaults.
 * @property {Turn[]} turns
 */
export {};
