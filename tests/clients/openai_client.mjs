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
// Tools and forms.
const parameters = {
  type: "object",
  properties: { city: { enum: ["Oslo", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const caller = new OpenAI({ baseURL: process.env.TOOLS_URL, apiKey: "none", maxRetries: 0 });
const tools = [{ type: "function", function: { name: "get_weather", parameters, strict: true } }];
const calling = { model, messages, tools, tool_choice: "required", parallel_tool_calls: false, temperature: 0 };
const called = (await caller.chat.completions.create(calling)).choices[0];
assert.equal(called.finish_reason, "tool_calls");
assert.equal(called.message.content, null);
const [call] = called.message.tool_calls;
assert.ok(["Oslo", "Rome"].includes(JSON.parse(call.function.arguments).city));
const result = { role: "tool", tool_call_id: call.id, content: "cold" };
const answered = await caller.chat.completions.create({
  model,
  tools,
  max_tokens: 4,
  messages: [...messages, called.message, result],
});
assert.ok(answered.usage.prompt_tokens > 0);
const calls = await caller.chat.completions.stream(calling).finalChatCompletion();
assert.equal(calls.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
let runs = 0;
const runner = caller.chat.completions.runTools({
  ...calling,
  tool_choice: { type: "function", function: { name: "get_weather" } },
  tools: [
    {
      type: "function",
      function: { name: "get_weather", parameters, strict: true, parse: JSON.parse, function: () => `cold ${++runs}` },
    },
  ],
});
assert.ok((await runner.finalFunctionToolCallResult()).startsWith("cold"));
assert.equal(runs, 1);
const form = { type: "json_schema", json_schema: { name: "city", schema: parameters, strict: true } };
const formed = await caller.chat.completions.parse({ model, messages, response_format: form, temperature: 0 });
assert.ok(["Oslo", "Rome"].includes(formed.choices[0].message.parsed.city));
const functions = [{ type: "function", name: "get_weather", parameters, strict: true }];
const responded = await caller.responses.create({
  model,
  input: "hi",
  tools: functions,
  tool_choice: "required",
  parallel_tool_calls: false,
  temperature: 0,
});
assert.equal(responded.output[0].type, "function_call");
const output = { type: "function_call_output", call_id: responded.output[0].call_id, output: "cold" };
await caller.responses.create({
  model,
  input: [output],
  previous_response_id: responded.id,
  tools: functions,
  max_output_tokens: 4,
});
console.log(`openai (JavaScript) ${(await import("openai/version")).VERSION}: as expected`);
