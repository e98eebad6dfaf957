// What programs do with OpenAI's JavaScript client. Each function gets the gateway's address and a key.
import OpenAI from "openai";

const MODEL = "meta/llama-2-70b-chat";
const ASK = {
  model: MODEL,
  messages: [{ role: "user", content: "What is the capital of France?" }],
  temperature: 0,
  max_tokens: 16,
};
const LONG = { ...ASK, max_tokens: 4000, stream: true };

const client = (base, key) => new OpenAI({ apiKey: key, baseURL: `${base}/v1`, maxRetries: 0 });
const chat = (base, key, members) => client(base, key).chat.completions.create({ ...ASK, ...members });
const code = (promise) => promise.catch((error) => `${error.constructor.name} ${error.code}`);

export async function whole(base, key) {
  const { choices, usage } = await chat(base, key);
  return { text: choices[0].message.content, reason: choices[0].finish_reason, usage };
}

export async function stream(base, key) {
  let text = "";
  let reason, usage;
  for await (const chunk of await chat(base, key, { stream: true, stream_options: { include_usage: true } })) {
    text += chunk.choices[0]?.delta.content ?? "";
    reason = chunk.choices[0]?.finish_reason ?? reason;
    usage = chunk.usage;
  }
  return { text, reason, usage };
}

export const helper = (base, key) => client(base, key).chat.completions.stream(ASK).finalContent();

export async function text(base, key) {
  const request = { model: MODEL, prompt: "The capital of France is", temperature: 0, max_tokens: 3 };
  return (await client(base, key).completions.create(request)).choices[0].text;
}

export async function models(base, key) {
  const ids = [];
  for await (const model of await client(base, key).models.list()) ids.push(model.id);
  return [...ids, (await client(base, key).models.retrieve(MODEL)).id];
}

export async function abort(base, key) {
  const stream = await chat(base, key, LONG);
  let chunks = 0;
  for await (const _ of stream) {
    chunks += 1;
    if (chunks === 3) stream.controller.abort();
  }
  return chunks;
}

export async function errors(base, key) {
  const tools = [{ type: "function", function: { name: "f" } }];
  const messages = [{ role: "user", content: "word ".repeat(20_000) }];
  return [
    await code(chat(base, "wrong")),
    await code(chat(base, key, { model: "gpt-4o" })),
    await code(chat(base, key, { tools })),
    await code(chat(base, key, { messages })),
  ];
}

export async function failingStream(base, key) {
  let text = "";
  try {
    for await (const chunk of await chat(base, key, { stream: true })) text += chunk.choices[0].delta.content ?? "";
  } catch (error) {
    return { text, error: error.constructor.name };
  }
  return { text };
}
