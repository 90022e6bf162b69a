#!/usr/bin/env bash
# Vercel AI SDK 7.0.173 with @ai-sdk/openai 4.0.118: a second turn sends no text of the first answer, only its id.
#
# Expected: `generateText({ model: openai("m"), messages })` sends the messages that it is given.
# Happens:  answers of `/v1/responses` come back as {"type": "item_reference", "id": "msg_.."} instead of their text,
#           unless the caller passes `store: false`: the provider takes it for granted that the server keeps all answers.
# Matters:  a server that offers `/v1/responses` and stores nothing fails in the second turn of every chat, or answers
#           without the first; moving a chat to another server fails the same way.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
echo '{"private": true, "type": "module"}' > package.json
npm install --silent --no-package-lock --no-audit --no-fund ai@7.0.173 @ai-sdk/openai@4.0.118 zod@4.6.7 node@22.23.3
cat > see.mjs <<'JAVASCRIPT'
import http from "node:http";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText } from "ai";

const bodies = [];
const server = http.createServer((request, response) => {
  let text = "";
  request.on("data", (piece) => (text += piece));
  request.on("end", () => {
    bodies.push(JSON.parse(text));
    const content = [{ type: "output_text", text: "Hello.", annotations: [], logprobs: [] }];
    const message = { id: "msg_1", type: "message", role: "assistant", status: "completed", content };
    const usage = { input_tokens: 1, output_tokens: 1, total_tokens: 2 };
    const body = { id: "resp_1", object: "response", created_at: 0, status: "completed", model: "m", error: null };
    response.setHeader("Content-Type", "application/json");
    response.end(JSON.stringify({ ...body, output: [message], incomplete_details: null, usage }));
  });
});
server.listen(0, "127.0.0.1", async () => {
  const model = createOpenAI({ baseURL: `http://127.0.0.1:${server.address().port}`, apiKey: "x" })("m");
  const messages = [{ role: "user", content: "hi" }];
  const first = await generateText({ model, messages });
  messages.push(...first.response.messages, { role: "user", content: "go on" });
  console.log("given:", JSON.stringify(messages[1].content));
  await generateText({ model, messages });
  console.log("sent: ", JSON.stringify(bodies[1].input[1]));
  process.exit(bodies[1].input[1].type === "item_reference" ? 0 : 1);
});
JAVASCRIPT
node_modules/.bin/node see.mjs
