/**
 * A request as a program to copy, in curl, Python and JavaScript. Each program is complete.
 *
 * A gateway without keys accepts any text as the key; otherwise the key comes from REPLICATE_API_TOKEN.
 */

/**
 * @typedef {Object} Request
 * @property {string} base The gateway's address, without a slash at the end.
 * @property {string} model
 * @property {boolean} needsKey
 * @property {Record<string, unknown>} input
 *
 * @typedef {{language: string, code: string, before: string}} Snippet
 */

const WIDTH = 88;

/**
 * @param {Request} request
 * @returns {Snippet[]}
 */
export function snippets(request) {
  return [
    {
      language: "curl",
      code: curl(request),
      before: "Prints the prediction when it has ended, or after 60 seconds.",
    },
    {
      language: "Python",
      code: python(request),
      before: 'Streams the answer. Install the client with `pip install "replicate<2"`.',
    },
    {
      language: "JavaScript",
      code: javascript(request),
      before:
        "Streams the answer. Save it as `llama.mjs`, and install the client with `npm install replicate@1.4`.",
    },
  ];
}

/** @param {Request} request */
function curl({ base, model, needsKey, input }) {
  const token = needsKey ? "$REPLICATE_API_TOKEN" : "any";
  // In a quoted here-document the shell changes nothing, and no line of JSON can be the delimiter.
  return `curl -sS ${shellWord(`${base}/v1/models/${model}/predictions`)} \\
  -H "Authorization: Bearer ${token}" \\
  -H "Content-Type: application/json" \\
  -H "Prefer: wait" \\
  --data-binary @- <<'JSON'
${JSON.stringify({ input }, null, 2)}
JSON
`;
}

/** @param {Request} request */
function python({ base, model, needsKey, input }) {
  const token = needsKey ? 'os.environ["REPLICATE_API_TOKEN"]' : '"any"';
  const imports = `${needsKey ? "import os\n\n" : ""}from replicate.client import Client`;
  return `${imports}

client = Client(
    base_url=${JSON.stringify(base)},
    api_token=${token},
)
inputs = ${pythonLiteral(input)}
for piece in client.stream(${JSON.stringify(model)}, input=inputs):
    print(piece, end="", flush=True)
print()
`;
}

/** @param {Request} request */
function javascript({ base, model, needsKey, input }) {
  const token = needsKey ? "process.env.REPLICATE_API_TOKEN" : '"any"';
  return `import Replicate from "replicate";

const replicate = new Replicate({
  baseUrl: ${JSON.stringify(`${base}/v1`)},
  auth: ${token},
});
const input = ${javascriptLiteral(input)};
for await (const event of replicate.stream(${JSON.stringify(model)}, { input })) {
  process.stdout.write(String(event));
}
process.stdout.write("\\n");
`;
}

/** @param {string} text */
function shellWord(text) {
  return /^[\w.,:/@%+=-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

/**
 * @param {unknown} value
 * @param {string} [indent]
 * @returns {string}
 */
function pythonLiteral(value, indent = "") {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  // JSON's escapes in a text mean the same in Python.
  if (typeof value !== "object") return JSON.stringify(value);
  return collection(value, indent, "    ", pythonLiteral, (key) => JSON.stringify(key), ["{", "}"]);
}

/**
 * @param {unknown} value
 * @param {string} [indent]
 * @returns {string}
 */
function javascriptLiteral(value, indent = "") {
  if (typeof value !== "object" || value === null) return JSON.stringify(value);
  return collection(value, indent, "  ", javascriptLiteral, javascriptKey, ["{ ", " }"]);
}

/** @param {string} key */
function javascriptKey(key) {
  if (key === "__proto__") return '["__proto__"]'; // without brackets it would set the prototype
  return /^[A-Za-z_$][\w$]*$/.test(key) ? key : JSON.stringify(key);
}

/**
 * Write a list or an object on one line if it fits, and otherwise with a line for each member.
 * @param {object} value
 * @param {string} indent
 * @param {string} step
 * @param {(value: unknown, indent: string) => string} literal
 * @param {(key: string) => string} name
 * @param {[string, string]} braces of an object on one line
 */
function collection(value, indent, step, literal, name, braces) {
  const isList = Array.isArray(value);
  const write = (/** @type {string} */ inner) =>
    isList
      ? value.map((item) => literal(item, inner))
      : Object.entries(value).map(([key, member]) => `${name(key)}: ${literal(member, inner)}`);
  const flat = write(indent);
  if (!flat.length) return isList ? "[]" : "{}";
  const [open, close] = isList ? ["[", "]"] : braces;
  const line = `${open}${flat.join(", ")}${close}`;
  if (!line.includes("\n") && indent.length + line.length <= WIDTH) return line;
  const members = write(indent + step).map((member) => `${indent}${step}${member},\n`);
  return `${open.trim()}\n${members.join("")}${indent}${close.trim()}`;
}
