// The Vercel AI SDK against a server: its OpenAI provider (chats, completions, responses) and the compatible one.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";

const settings = { baseURL: process.env.BASE_URL, apiKey: "none" };
const openai = createOpenAI(settings);
const compatible = createOpenAICompatible({ name: "ours", ...settings });
const asked = { prompt: "hi", temperature: 0, maxOutputTokens: 8, maxRetries: 0 };

const kinds = {
  chat: openai.chat("toy"),
  completion: openai.completion("toy"),
  responses: openai.responses("toy"),
  compatible: compatible("toy"),
};
const texts = {};
for (const [name, model] of Object.entries(kinds)) {
  const whole = await generateText({ model, ...asked });
  assert.equal(whole.usage.outputTokens > 0, true, name);
  assert.ok(["length", "stop"].includes(whole.finishReason), `${name}: ${whole.finishReason}`);
  const stream = streamText({
    model,
    ...asked,
    onError: ({ error }) => {
      throw error;
    },
  });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, whole.text, name);
  texts[name] = text;
}
assert.equal(texts.chat, texts.responses);
assert.equal(texts.chat, texts.compatible);

// A second turn, with the messages that the SDK gives for the first.
for (const name of ["chat", "responses", "compatible"]) {
  const messages = [{ role: "user", content: "hi" }];
  const first = await generateText({ model: kinds[name], messages, temperature: 0, maxOutputTokens: 8 });
  messages.push(...first.response.messages, { role: "user", content: "go on" });
  const second = await generateText({ model: kinds[name], messages, temperature: 0, maxOutputTokens: 8 });
  assert.ok(second.usage.inputTokens > first.usage.inputTokens, name);
}

const thought = await generateText({
  model: kinds.compatible,
  ...asked,
  providerOptions: { ours: { reasoningEffort: "low" } },
});
assert.ok(thought.reasoningText.length > 0);
assert.equal(thought.text, "");
const parts = [];
const thinking = streamText({
  model: kinds.compatible,
  ...asked,
  providerOptions: { ours: { reasoningEffort: "low" } },
});
for await (const part of thinking.fullStream) parts.push(part.type);
assert.ok(parts.includes("reasoning-delta"), parts.join(" "));

await assert.rejects(
  generateText({ model: kinds.chat, ...asked, temperature: 9 }),
  (error) => error.statusCode === 400 && /temperature/.test(error.message),
);
// Tools that the SDK runs, in two steps, and objects.
const inputSchema = jsonSchema({
  type: "object",
  properties: { city: { enum: ["Oslo", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
});
const there = { baseURL: process.env.TOOLS_URL, apiKey: "none" };
const callers = {
  chat: createOpenAI(there).chat("toy"),
  responses: createOpenAI(there).responses("toy"),
  compatible: createOpenAICompatible({ name: "ours", supportsStructuredOutputs: true, ...there })("toy"),
};
const maxOutputTokens = 900;
for (const [name, model] of Object.entries(callers)) {
  const seen = [];
  const tools = {
    get_weather: tool({
      description: "weather",
      inputSchema,
      strict: true,
      execute: ({ city }) => {
        seen.push(city);
        return `cold in ${city}`;
      },
    }),
  };
  const steps = {
    stopWhen: stepCountIs(2),
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : { type: "tool", toolName: "get_weather" } }),
  };
  const how = { model, prompt: "hi", temperature: 0, maxRetries: 0, maxOutputTokens, tools, ...steps };
  const done = await generateText(how);
  assert.equal(done.steps.length, 2, name);
  assert.equal(done.steps[0].toolCalls[0].input.city, seen[0], name);
  const streamed = streamText({
    ...how,
    onError: ({ error }) => {
      throw error;
    },
  });
  await streamed.consumeStream();
  assert.equal((await streamed.steps).length, 2, name);
  assert.equal(seen.length, 2, name);
  const formed = await generateText({
    model,
    prompt: "hi",
    temperature: 0,
    maxOutputTokens,
    output: Output.object({ schema: inputSchema }),
  });
  assert.ok(["Oslo", "Rome"].includes(formed.output.city), name);
}
const version = JSON.parse(readFileSync(new URL("node_modules/ai/package.json", import.meta.url))).version;
console.log(`Vercel AI SDK ${version}: as expected`);
