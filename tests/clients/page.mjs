// The web page of a server in headless Chromium: what a user sees and does, and that nothing comes from elsewhere.
import assert from "node:assert/strict";
import puppeteer from "puppeteer-core";

const home = new URL("/", process.env.BASE_URL).href;
const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM,
  args: ["--no-sandbox", "--disable-gpu"],
});
const page = await browser.newPage();
const asked = [];
const faults = [];
page.on("request", (request) => asked.push(request.url()));
page.on("pageerror", (error) => faults.push(error.message));
page.on("console", (message) => message.type() === "error" && faults.push(message.text()));

const text = (id) => page.$eval(id, (element) => element.textContent);
const until = (what, ...args) => page.waitForFunction(what, { timeout: 20_000 }, ...args);
const idle = () => until(() => !document.getElementById("send").disabled);
const position = async () => Number((await text("#position")).replaceAll(",", ""));

async function say(words) {
  await page.type("#text", words);
  await page.keyboard.press("Enter");
  await until(() => document.getElementById("send").disabled);
}

await page.goto(`${home}#ada`);
await until((name) => document.title === name, "toy");
assert.equal(await position(), 0);

await say("hello <b>you</b>");
await idle();
const first = await position();
assert.ok(first > 20, "the prompt and the answer count");
assert.equal(await page.$eval("#log .user", (element) => element.textContent), "hello <b>you</b>");
assert.equal(await page.$eval("#log .user", (element) => element.children.length), 0, "text stays text");
assert.ok(await page.$("#log .assistant, #log .thinking"), "there is an answer");
assert.match(await text("#filling"), /tokens kept/);
assert.ok(Number(await text("#speed")) > 0);

await say("again");
await idle();
const second = await position();
assert.ok(second > first, "the conversation goes on");

// It outlives the page: the name is in the address.
await page.reload();
await until((there) => Number(document.getElementById("position").textContent.replaceAll(",", "")) === there, second);

await page.click("#forget");
await until(() => document.getElementById("position").textContent === "0");

await page.click("#new");
assert.notEqual(await page.$eval("#name", (element) => element.value), "ada");
await say("x".repeat(40));
await page.click("#stop").catch(() => {});
await idle();
assert.equal(await page.$eval("#problem", (element) => element.hidden), true);

// A refusal is shown in the server's words.
await page.evaluate(() => (document.getElementById("name").value = "n".repeat(2000)));
await page.type("#text", "hi");
await page.click("#send");
await until(() => !document.getElementById("problem").hidden);
assert.match(await text("#problem"), /conversation/);

// With keys the page asks for one.
const locked = new URL("/", process.env.LOCKED_URL).href;
faults.length = 0;
await page.goto(locked);
await until(() => !document.getElementById("key-row").hidden);
await page.type("#key", process.env.KEY);
await page.click("#use-key");
await until((name) => document.title === name, "toy");
assert.equal(await page.$eval("#key-row", (element) => element.hidden), true);

const elsewhere = asked.filter((url) => !url.startsWith(home) && !url.startsWith(locked) && !url.startsWith("data:"));
assert.deepEqual(elsewhere, []);
await browser.close();
console.log("page: a chat in Chromium is as it should be");
