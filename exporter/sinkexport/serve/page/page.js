// A chat with one endless conversation of this server. Nothing is loaded from elsewhere, nothing is written as HTML.
const at = (id) => document.getElementById(id);
const LOOK_MS = 500; // how often the position is asked for while an answer runs

let model = "";
let capacity = 1;
let sinks = 0;
let running = null; // AbortController of the answer in progress
let key = sessionStorage.getItem("sinkexport-key") ?? "";

function headers() {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function problem(text) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

/** Asks the server; says what is wrong if it refuses. Returns: the response, or null. */
async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  if (response.ok) return response;
  if (response.status === 401) at("key-row").hidden = false;
  const body = await response.json().catch(() => null);
  problem(body?.error?.message ?? `the server answered ${response.status}`);
  return null;
}

function showPosition(position) {
  const kept = Math.min(position, capacity);
  at("position").textContent = position.toLocaleString("en");
  at("window").max = capacity;
  at("window").value = kept;
  at("filling").textContent =
    position <= capacity
      ? `${kept} of ${capacity} tokens kept`
      : `the first ${sinks} and the last ${capacity - sinks} tokens kept`;
}

async function position() {
  const response = await fetch(`v1/conversations/${encodeURIComponent(at("name").value)}`, { headers: headers() });
  return response.ok ? (await response.json()).position : 0;
}

function add(kind, text = "") {
  const paragraph = document.createElement("p");
  paragraph.className = kind;
  paragraph.textContent = text;
  at("log").append(paragraph);
  return paragraph;
}

function choose(name) {
  at("name").value = name;
  history.replaceState(null, "", `#${encodeURIComponent(name)}`);
}

async function begin() {
  problem("");
  const response = await ask("v1/models");
  if (!response) return;
  at("key-row").hidden = true;
  const facts = (await response.json()).data[0];
  model = facts.id;
  sinks = facts.stream.num_sink_tokens;
  capacity = facts.stream.num_sink_tokens + facts.stream.window_size;
  at("model").textContent = model;
  document.title = model;
  showPosition(await position());
}

/** The events of a response as it comes. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function watch(signal) {
  let before = await position();
  let since = performance.now();
  while (!signal.aborted) {
    await new Promise((done) => setTimeout(done, LOOK_MS));
    if (signal.aborted) return;
    const now = performance.now();
    const here = await position();
    if (signal.aborted) return;
    showPosition(here);
    at("speed").textContent = (((here - before) * 1000) / (now - since)).toFixed(1);
    [before, since] = [here, now];
  }
}

async function say(text) {
  problem("");
  add("user", text);
  running = new AbortController();
  const watching = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  watch(watching.signal).catch(() => {});
  let thought = null;
  let said = null;
  const started = performance.now();
  try {
    const response = await ask("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        model,
        messages: [{ role: "user", content: text }],
        conversation: at("name").value,
        stream: true,
        stream_options: { include_usage: true },
      }),
      signal: running.signal,
    });
    for await (const event of response ? events(response) : []) {
      if (event.error) problem(event.error.message);
      const delta = event.choices?.[0]?.delta;
      if (delta?.reasoning_content) (thought ??= add("thinking")).append(delta.reasoning_content);
      if (delta?.content) (said ??= add("assistant")).append(delta.content);
      if (event.conversation) showPosition(event.conversation.position);
      if (event.usage) {
        const seconds = (performance.now() - started) / 1000;
        at("speed").textContent = (event.usage.completion_tokens / seconds).toFixed(1);
      }
      at("log").scrollTop = at("log").scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") problem(`no answer: ${error.message}`);
  } finally {
    watching.abort();
    running = null;
    at("send").disabled = false;
    at("stop").disabled = true;
    showPosition(await position().catch(() => 0));
  }
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("text").value;
  if (!text.trim() || running) return;
  at("text").value = "";
  say(text);
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", () => {
  choose(`web-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`);
  at("log").replaceChildren();
  showPosition(0);
});
at("forget").addEventListener("click", async () => {
  if (!running && (await ask(`v1/conversations/${encodeURIComponent(at("name").value)}`, { method: "DELETE" }))) {
    at("log").replaceChildren();
    showPosition(0);
  }
});
at("name").addEventListener("change", async () => {
  choose(at("name").value.trim() || "web");
  at("log").replaceChildren();
  showPosition(await position());
});
at("use-key").addEventListener("click", () => {
  key = at("key").value.trim();
  sessionStorage.setItem("sinkexport-key", key);
  begin();
});

const named = decodeURIComponent(location.hash.slice(1));
if (named) choose(named);
else at("new").click();
begin();
