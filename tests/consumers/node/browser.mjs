// Uses the page of examples/browser as a person does, in the system's Chromium, and prints what it saw as JSON.
//
//     node browser.mjs '{"url": ..., "chromium": ..., "views": [...], "asks": [{"model", "text"}], "pictures": FOLDER}'

import { createRequire } from "node:module";
import { join } from "node:path";
import { chromium } from "playwright-core";

const { url, chromium: executablePath, views, asks, pictures } = JSON.parse(process.argv[2]);
const axe = createRequire(import.meta.url).resolve("axe-core/axe.min.js");
const MINUTES = 60_000;
const VIEWS = {
  desktop: { viewport: { width: 1280, height: 800 }, colorScheme: "light" },
  dark: { viewport: { width: 1280, height: 800 }, colorScheme: "dark" },
  phone: { viewport: { width: 360, height: 740 }, colorScheme: "light", deviceScaleFactor: 2, hasTouch: true },
};

async function ask(page, { model, text }) {
  await page.getByRole("radio", { name: model }).check();
  await page.getByRole("textbox").fill(text);
  await page.locator("#submit").click();
  const status = page.getByRole("status");
  await page.waitForFunction(() => document.querySelector("#submit").ariaDisabled === "false", null, {
    timeout: 8 * MINUTES,
  });
  const rows = await page.locator("#scores dt").allTextContents();
  const numbers = await page.locator("#scores dd.number").allTextContents();
  const written = page.locator("#written");
  return {
    status: await status.textContent(),
    wrong: await status.evaluate((element) => element.classList.contains("wrong")),
    written: (await written.isVisible()) ? await written.textContent() : null,
    scores: (await page.locator("#scores").isVisible()) ? rows.map((label, row) => [label, numbers[row]]) : null,
    wide: await page.evaluate(() => document.documentElement.scrollWidth > innerWidth),
  };
}

async function violations(page) {
  await page.addScriptTag({ path: axe });
  const found = await page.evaluate(() => window.axe.run());
  return found.violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.target).join(", ")}`);
}

async function open(browser, options) {
  const context = await browser.newContext(options);
  context.setDefaultTimeout(MINUTES);
  const page = await context.newPage();
  await page.goto(url);
  await page.getByRole("radio").first().waitFor();
  return page;
}

// A policy that forbids other scripts forbids the checker too, so that it has a page of its own.
async function accessibility(browser, name) {
  const page = await open(browser, { ...VIEWS[name], bypassCSP: true });
  const found = await violations(page);
  await ask(page, asks[0]);
  found.push(...(await violations(page)));
  await page.context().close();
  return found;
}

async function view(browser, name) {
  const page = await open(browser, VIEWS[name]);
  const picture = (part) => page.screenshot({ path: join(pictures, `${name}-${part}.png`), fullPage: true });
  await picture("start");
  const answers = [];
  for (const [number, asked] of asks.entries()) {
    answers.push(await ask(page, asked));
    await picture(number);
  }
  const isolated = await page.evaluate(() => crossOriginIsolated);
  await page.context().close();
  return { answers, isolated, accessibility: await accessibility(browser, name) };
}

const browser = await chromium.launch({
  executablePath,
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});
try {
  const seen = { console: [], requests: new Set() };
  browser.on("context", (context) => {
    context.on("console", (message) => seen.console.push(`${message.type()}: ${message.text()}`));
    context.on("weberror", (error) => seen.console.push(`error: ${error.error()}`));
    context.on("request", (request) => seen.requests.add(request.url()));
    context.on("requestfailed", (request) => seen.console.push(`failed: ${request.url()}`));
  });
  const found = {};
  for (const name of views) found[name] = await view(browser, name);
  console.log(JSON.stringify({ views: found, console: seen.console, requests: [...seen.requests] }));
} finally {
  await browser.close();
}
