// A scripted conversation of the official openai package for Node with a running server.
// Usage: node openai_client.mjs BASE_URL, with the package installed beside this file or in NODE_PATH.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "test", maxRetries: 0 });
const [{ id: model }] = (await client.models.list()).data;
const messages = [{ role: "user", content: "Tell me a story about a robot." }];
const ask = { model, messages, max_tokens: 16, temperature: 0, enable_thinking: false };

const whole = await client.chat.completions.create(ask);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(text, whole.choices[0].message.content);

const parameters = {
  type: "object",
  properties: { room: { enum: ["kitchen", "hall"] } },
  required: ["room"],
};
const tools = [{ type: "function", function: { name: "set_lamp", parameters } }];
const named = { type: "function", function: { name: "set_lamp" } };
const called = await client.chat.completions
  .stream({ ...ask, max_tokens: 80, tools, tool_choice: named })
  .finalChatCompletion();
const call = called.choices[0].message.tool_calls[0].function;
assert.ok(["kitchen", "hall"].includes(JSON.parse(call.arguments).room));

const stream = await client.chat.completions.create({ ...ask, max_tokens: 2000, stream: true });
for await (const _ of stream) break;
await assert.rejects(
  client.chat.completions.create({ ...ask, frobnicate: 1 }),
  (error) => error.status === 400 && error.param === "frobnicate",
);
const response = await client.responses.create({ model, input: "Hello", max_output_tokens: 8 });
assert.ok(response.usage.output_tokens <= 8);
console.log("openai for node: ok");
