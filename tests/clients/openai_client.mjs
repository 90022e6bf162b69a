// The official JavaScript client against a server: chats, completions and responses, streamed and not.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "none", maxRetries: 0 });
const ours = { temperature: 0, ignore_eos: true };
const messages = [{ role: "user", content: "hi" }];

const model = (await client.models.list()).data[0].id;
assert.equal((await client.models.retrieve(model)).id, model);

const chat = { model, messages, max_tokens: 8, ...ours };
const whole = await client.chat.completions.create(chat);
const text = whole.choices[0].message.content;
assert.equal(whole.choices[0].finish_reason, "length");
assert.equal(whole.usage.completion_tokens, 8);

let streamed = "";
let usage = null;
for await (const chunk of await client.chat.completions.create({
  ...chat,
  stream: true,
  stream_options: { include_usage: true },
})) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, text);
assert.equal(usage.completion_tokens, 8);

const helper = client.chat.completions.stream(chat);
assert.equal((await helper.finalChatCompletion()).choices[0].message.content, text);

// What the client gave is taken back as it is.
const echoed = await client.chat.completions.create({
  ...chat,
  messages: [...messages, whole.choices[0].message, { role: "user", content: "go on" }],
});
assert.equal(echoed.choices[0].message.role, "assistant");

const many = await client.chat.completions.create({ ...chat, n: 2, logprobs: true, top_logprobs: 2 });
assert.deepEqual(
  many.choices.map((choice) => choice.logprobs.content.length),
  [8, 8],
);
const biased = await client.chat.completions.create({ ...chat, logit_bias: { 65: 100 }, presence_penalty: 0.5 });
assert.equal(biased.choices[0].message.content, "A".repeat(8));

const thought = await client.chat.completions.create({ ...chat, reasoning_effort: "low" });
assert.ok(thought.choices[0].message.reasoning_content.length > 0);
assert.equal(thought.choices[0].message.content, "");

const completion = await client.completions.create({ model, prompt: "hi", max_tokens: 8, logprobs: 1, ...ours });
assert.equal(completion.choices[0].logprobs.tokens.length, 8);
let pieces = "";
for await (const chunk of await client.completions.create({
  model,
  prompt: "hi",
  max_tokens: 8,
  stream: true,
  ...ours,
})) {
  pieces += chunk.choices[0].text;
}
assert.equal(pieces, completion.choices[0].text);

const asked = { model, input: "hi", max_output_tokens: 8, ...ours };
const response = await client.responses.create(asked);
assert.equal(response.output_text, text);
const events = [];
let deltas = "";
for await (const event of await client.responses.create({ ...asked, stream: true })) {
  events.push(event.type);
  if (event.type === "response.output_text.delta") deltas += event.delta;
}
assert.equal(deltas, text);
assert.equal(events[0], "response.created");
assert.equal(events.at(-1), "response.incomplete");

await assert.rejects(client.chat.completions.create({ ...chat, temperature: 9 }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.equal(error.param, "temperature");
  return true;
});
await assert.rejects(client.embeddings.create({ model, input: "hi" }), OpenAI.BadRequestError);
console.log(`openai (JavaScript) ${(await import("openai/version")).VERSION}: as expected`);
