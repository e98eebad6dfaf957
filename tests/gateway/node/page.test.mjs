// The page's modules that need no browser. They are imported from where the gateway serves them.
import assert from "node:assert/strict";
import { test } from "node:test";

const STATIC = "../../../llama/gateway/page/static";
const { changedInputs, errorsByField, readEntered, readFields } = await import(`${STATIC}/inputs/schema.js`);
const { inputsFor, isDialogue, messagesOf, titleFrom, withoutLastAnswer } = await import(
  `${STATIC}/chat/dialogue.js`
);
const { DialogueStorage, NotStored } = await import(`${STATIC}/chat/dialogue_storage.js`);
const { ApiError, describe } = await import(`${STATIC}/gateway/errors.js`);
const { metricsLine, money, priceOf } = await import(`${STATIC}/common/format.js`);
const { readLog, splitControlTokens } = await import(`${STATIC}/answer/prompt_log.js`);
const { routeOf } = await import(`${STATIC}/router.js`);
const { snippets } = await import(`${STATIC}/inputs/snippets.js`);

const document = {
  components: {
    schemas: {
      Input: {
        properties: {
          top_k: { type: "integer", "x-order": 2, default: 50, minimum: -1, maximum: 100 },
          prompt: { type: "string", "x-order": 0, description: "What to answer" },
          debug: { type: "boolean", "x-order": 3, default: false },
          messages: { type: "array", "x-order": 4 },
          system_prompt: { type: "string", "x-order": 1, default: "Be kind" },
          old: { type: "number", "x-order": 5, deprecated: true },
        },
      },
    },
  },
};
const fields = readFields(document);
const field = (name) => fields.find((one) => one.name === name);

test("fields are read in the order of the schema", () => {
  assert.deepEqual(
    fields.map(({ name, kind }) => `${name}: ${kind}`),
    [
      "prompt: text",
      "system_prompt: text",
      "top_k: integer",
      "debug: boolean",
      "messages: json",
      "old: number",
    ],
  );
  assert.deepEqual(readFields(null), []);
  assert.equal(field("old").deprecated, true);
});

for (const [name, entered, value, error] of [
  ["prompt", "", undefined, null],
  ["system_prompt", "", "", null], // empty is a value of its own, because the default is a text
  ["top_k", "0", 0, null],
  ["top_k", " -1 ", -1, null],
  ["top_k", "1.5", undefined, /whole/],
  ["top_k", "101", undefined, /100 or less/],
  ["top_k", "1e400", undefined, /Enter a number/],
  ["top_k", "", undefined, null],
  ["debug", true, true, null],
  ["messages", "[]", [], null],
  ["messages", "null", undefined, null],
  ["messages", "{}", undefined, /list/],
  ["messages", "[", undefined, /not valid JSON/],
]) {
  test(`${JSON.stringify(entered)} is read as the value of ${name}`, () => {
    const read = readEntered(field(name), entered);
    assert.deepEqual(read.value, value);
    if (error) assert.match(read.error, error);
    else assert.equal(read.error, null);
  });
}

test("only inputs that differ from their defaults are sent", () => {
  const values = { prompt: "Hi", system_prompt: "", top_k: 50, debug: false, messages: undefined };
  assert.deepEqual(changedInputs(fields, values), { prompt: "Hi", system_prompt: "" });
});

test("errors are sorted by the input that they are about", () => {
  const invalid = [
    { field: "input.top_k", description: "too large" },
    { field: "input.messages.0.role", description: "unknown" },
    { field: "input.other", description: "no such input" },
  ];
  assert.deepEqual(errorsByField(fields, invalid), {
    byField: { top_k: "too large", messages: "0.role: unknown" },
    others: ["input.other: no such input"],
  });
});

const user = (content) => ({ role: "user", content });
const answer = (content) => ({ role: "assistant", content, status: "succeeded", predictionId: "1" });

test("messages alternate even if an answer is empty", () => {
  assert.deepEqual(messagesOf([user("a"), answer(""), user("b"), answer("c")]), [
    user("a\n\nb"),
    { role: "assistant", content: "c" },
  ]);
});

test("a retry leaves out the last answer only", () => {
  assert.deepEqual(withoutLastAnswer([user("a"), answer("b")]), [user("a")]);
  assert.deepEqual(withoutLastAnswer([user("a")]), [user("a")]);
});

test("an answer's inputs have the chat's settings and the system prompt", () => {
  const dialogue = { settings: { top_k: 0 }, systemPrompt: "" };
  const inputs = inputsFor(dialogue, [user("a")], "Be kind");
  assert.deepEqual(inputs, { top_k: 0, system_prompt: "", messages: [user("a")] });
});

test("a title is one short line", () => {
  assert.equal(titleFrom("  What\nis   this? "), "What is this?");
  assert.ok(titleFrom("word ".repeat(100)).length <= 62);
  assert.ok(titleFrom("x".repeat(100)).length <= 62);
  assert.ok(titleFrom(`x${"😀".repeat(100)}`).isWellFormed(), "an emoji was cut in half");
});

function storage(room = Infinity) {
  const items = new Map();
  return {
    items,
    get length() {
      return items.size;
    },
    key: (index) => [...items.keys()][index] ?? null,
    getItem: (name) => items.get(name) ?? null,
    setItem(name, value) {
      if (value.length > room) throw new Error("QuotaExceededError");
      items.set(name, value);
    },
    removeItem: (name) => items.delete(name),
  };
}

const dialogue = (id, updated = 1) => ({
  id,
  title: "t",
  updated,
  systemPrompt: null,
  settings: {},
  turns: [user("a")],
});

test("dialogues are stored by path and by key", () => {
  const shared = storage();
  const ann = new DialogueStorage(shared, "%2F:ann");
  ann.save(dialogue("1", 1));
  ann.save(dialogue("2", 2));
  assert.deepEqual(
    ann
      .all()
      .map(({ id }) => id)
      .sort(),
    ["1", "2"],
  );
  assert.deepEqual(new DialogueStorage(shared, "%2F:bob").all(), []);
  assert.deepEqual(new DialogueStorage(shared, "%2Fllama%2F:ann").all(), []);
  assert.deepEqual(new DialogueStorage(shared, "%2F:an").all(), []);
  ann.delete("2");
  assert.equal(ann.get("2"), null);
});

test("a stored item that is no dialogue is left out", () => {
  const broken = storage();
  const dialogues = new DialogueStorage(broken, "%2F:ann");
  dialogues.save(dialogue("1"));
  const [name] = broken.items.keys();
  for (const text of [
    "",
    "{",
    "null",
    "[]",
    '{"id": "x"}',
    '{"id":"x","title":"","updated":1,"settings":{},"turns":[{}]}',
  ]) {
    broken.items.set(name, text);
    assert.deepEqual(dialogues.all(), []);
  }
  assert.ok(isDialogue(dialogue("1")));
});

test("a full storage keeps what was stored before", () => {
  const full = storage(200);
  const dialogues = new DialogueStorage(full, "%2F:ann");
  dialogues.save(dialogue("1"));
  assert.throws(() => dialogues.save({ ...dialogue("1"), title: "x".repeat(300) }), NotStored);
  assert.equal(dialogues.get("1").title, "t");
});

for (const [status, problem, retryAfter, text] of [
  [0, {}, null, /could not be reached/],
  [402, { detail: "Used 9 of 5 tokens." }, null, /9 of 5/],
  [
    422,
    { detail: "- input.top_k: too large\n- input.seed: too small" },
    null,
    /top_k: too large; input.seed/,
  ],
  [429, { detail: "Too many." }, 1, /in 1 second\.$/],
  [503, { title: "Not ready", detail: "Wait." }, null, /Not ready: Wait \(HTTP 503\)\.$/],
  [418, {}, null, /HTTP 418/],
  [400, { title: { a: 1 }, detail: ["from a proxy"], invalid_fields: "x" }, null, /^No reason was given/],
  [422, { invalid_fields: [null, { field: 1 }] }, null, /an input is invalid/],
]) {
  test(`the refusal ${status} is explained`, () => {
    const error = new ApiError(status, problem, retryAfter);
    assert.match(describe(error), text);
    assert.deepEqual(errorsByField(fields, error.invalidFields), { byField: {}, others: [] });
  });
}

test("a measurement that is not a number is left out", () => {
  const metrics = { input_token_count: 2, time_to_first_token: null, tokens_per_second: "fast" };
  const names = metricsLine(metrics, { input: 1, output: 1 }).map(({ name }) => name);
  assert.deepEqual(names, ["input tokens", "price"]);
});

for (const [metrics, queue] of [
  [{ total_time: 91.5, predict_time: 1.5 }, ["90 s"]],
  [{ total_time: 90, predict_time: 0 }, ["90 s"]], // it was stopped before a server began
  [{ total_time: 1.55, predict_time: 1.5 }, []],
  [{ total_time: 91.5 }, []],
  [{ predict_time: 1.5 }, []],
  [{ total_time: "long", predict_time: 1.5 }, []],
]) {
  test(`the wait in the queue of ${JSON.stringify(metrics)} is shown if it is known and noticeable`, () => {
    const line = metricsLine(metrics, { input: 1, output: 1 });
    const shown = line.filter(({ name }) => name === "in the queue").map(({ value }) => value);
    assert.deepEqual(shown, queue);
  });
}

test("one token is not called tokens", () => {
  const metrics = { input_token_count: 0, output_token_count: 1 };
  const names = metricsLine(metrics, { input: 1, output: 1 }).map(({ name }) => name);
  assert.deepEqual(names, ["input tokens", "output token", "price"]);
});

test("prices are exact to a millionth of a dollar", () => {
  const prices = { input: 0.65, output: 2.75 };
  assert.equal(money(priceOf({ input_token_count: 1, output_token_count: 1 }, prices)), "$0.000003");
  assert.equal(money(priceOf({ input_token_count: 1000 }, prices)), "$0.00065");
  assert.equal(money(priceOf({}, prices)), "$0.00");
  assert.equal(money(1234.5), "$1,234.50");
});

test("the formatted prompt is read from the log as Python wrote it", () => {
  const logs = String.raw`note: one
formatted prompt: '<s>[INST] It\'s "x"\n\t\\n\x00\u2028\U0001f600é [/INST]'
more`;
  const { prompt, rest } = readLog(logs);
  assert.equal(prompt, '<s>[INST] It\'s "x"\n\t\\n\x00\u2028😀é [/INST]');
  assert.equal(rest, "note: one\nmore");
  assert.deepEqual(readLog(null), { prompt: null, rest: "" });
});

test("control tokens are told from text", () => {
  assert.deepEqual(splitControlTokens("<s>[INST] <b> [/INST]"), [
    "",
    "<s>",
    "",
    "[INST]",
    " <b> ",
    "[/INST]",
    "",
  ]);
});

for (const [hash, view, id] of [
  ["", "chat", ""],
  ["#/chat/ab-1", "chat", "ab-1"],
  ["#/inputs", "inputs", ""],
  ["#/predictions/abc", "inputs", "abc"],
  ["#/usage", "usage", ""],
  ["#/predictions/../../page/logout", "chat", ""],
  ["#javascript:alert(1)", "chat", ""],
]) {
  test(`the address ${hash || "without a hash"} is known`, () =>
    assert.deepEqual(routeOf(hash), { view, id }));
}

test("programs quote what they contain", () => {
  const input = {
    prompt: "it's $HOME\n`id`\nJSON\n",
    stop: null,
    on: true,
    list: [1, 0.5],
    ["__proto__"]: 1,
  };
  const request = { base: "http://h/a'b", model: "m/n", needsKey: false, input };
  const [curl, python, javascript] = snippets(request).map(({ code }) => code);
  assert.match(curl, /'http:\/\/h\/a'\\''b\/v1\/models\/m\/n\/predictions'/);
  assert.match(curl, /<<'JSON'/);
  assert.doesNotMatch(curl.slice(0, -"JSON\n".length), /^JSON$/m);
  assert.match(python, /"stop": None/);
  assert.match(python, /"on": True/);
  assert.match(javascript, /\["__proto__"\]: 1/);
});
