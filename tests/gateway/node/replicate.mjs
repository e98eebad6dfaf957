// What programs do with Replicate's JavaScript client. Each function gets the gateway's address and a key.
import { createServer } from "node:http";
import Replicate, { validateWebhook } from "replicate";

const MODEL = "meta/llama-2-70b-chat";
const ASK = {
  prompt: "What is the capital of France?",
  system_prompt: "",
  temperature: 0,
  max_new_tokens: 16,
};
const LONG = { prompt: "Count to a thousand.", max_new_tokens: 150, min_new_tokens: 150 };
const BLANK = { prompt: "" };

const client = (base, key) => new Replicate({ auth: key, baseUrl: `${base}/v1` });
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function latest(replicate) {
  const [owner, name] = MODEL.split("/");
  return (await replicate.models.get(owner, name)).latest_version.id;
}

async function read(stream) {
  let text = "";
  let last;
  for await (const event of stream) {
    text += event.toString();
    last = event.event;
  }
  return { text, last };
}

export async function run(base, key) {
  const replicate = client(base, key);
  const version = await latest(replicate);
  const outputs = [
    await replicate.run(MODEL, { input: ASK }),
    await replicate.run(`${MODEL}:${version}`, { input: ASK }),
    await replicate.run(MODEL, { input: ASK, wait: { mode: "poll", interval: 100 } }),
  ];
  return outputs.map((output) => output.join(""));
}

export async function runLongerThanItsWait(base, key) {
  const replicate = client(base, key);
  const output = await replicate.run(MODEL, { input: LONG, wait: { mode: "block", timeout: 1 } });
  const newest = (await replicate.predictions.list()).results[0];
  return [output.join(""), newest.output.join("")];
}

export const runThatFails = (base, key) => client(base, key).run(MODEL, { input: BLANK });

export const stream = (base, key) => read(client(base, key).stream(MODEL, { input: ASK }));

export const streamThatFails = (base, key) => read(client(base, key).stream(MODEL, { input: BLANK }));

export async function cancel(base, key) {
  const replicate = client(base, key);
  const created = await replicate.predictions.create({ model: MODEL, input: LONG });
  await replicate.predictions.cancel(created.id);
  return (await replicate.predictions.get(created.id)).status;
}

export async function list(base, key) {
  const replicate = client(base, key);
  const created = await replicate.predictions.create({ model: MODEL, input: ASK });
  const ids = [];
  for await (const page of replicate.paginate(replicate.predictions.list)) {
    ids.push(...page.map((prediction) => prediction.id));
  }
  return ids.includes(created.id);
}

export async function catalog(base, key) {
  const replicate = client(base, key);
  const [owner, name] = MODEL.split("/");
  const versions = (await replicate.models.versions.list(owner, name)).results;
  const version = await replicate.models.versions.get(owner, name, versions[0].id);
  const deployment = await replicate.deployments.get("acme", "llama");
  const prediction = await replicate.deployments.predictions.create("acme", "llama", { input: ASK });
  return [
    version.openapi_schema.components.schemas.Output.type,
    (await replicate.models.list()).results[0].name,
    deployment.current_release.model,
    (await replicate.wait(prediction, { interval: 100 })).status,
    (await replicate.accounts.current()).type,
  ];
}

export async function webhook(base, key) {
  const replicate = client(base, key);
  const received = [];
  const server = createServer((request, response) => {
    let body = "";
    request.on("data", (data) => (body += data)).on("end", () => {
      received.push({ headers: request.headers, body });
      response.end();
    });
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  const created = await replicate.predictions.create({
    model: MODEL,
    input: ASK,
    webhook: `http://127.0.0.1:${server.address().port}/hook`,
    webhook_events_filter: ["completed"],
  });
  for (let i = 0; i < 600 && !received.length; i++) await sleep(100);
  const secret = (await replicate.webhooks.default.secret.get()).key;
  const { id, status } = JSON.parse(received[0].body);
  return { valid: await validateWebhook(received[0], secret), own: id === created.id, status };
}
