// Opens a page that stands alone in the system's Chromium, at several widths and in light and dark, every table
// unfolded, and prints what it saw as JSON.
//
//     node page.mjs '{"page": URL, "chromium": ..., "pictures": FOLDER}'

import { createRequire } from "node:module";
import { join } from "node:path";
import { chromium } from "playwright-core";

const { page: url, chromium: executablePath, pictures } = JSON.parse(process.argv[2]);
const axe = createRequire(import.meta.url).resolve("axe-core/axe.min.js");
const DESKTOP = { viewport: { width: 1280, height: 800 } };
const VIEWS = {
  desktop: { ...DESKTOP, colorScheme: "light" },
  dark: { ...DESKTOP, colorScheme: "dark" },
  phone: { viewport: { width: 390, height: 844 }, colorScheme: "light", deviceScaleFactor: 2, hasTouch: true },
  print: { ...DESKTOP, colorScheme: "dark" },
};

async function open(browser, name, options = {}) {
  const context = await browser.newContext({ ...VIEWS[name], ...options });
  const page = await context.newPage();
  if (name === "print") await page.emulateMedia({ media: "print" });
  await page.goto(url);
  await page.evaluate(() => document.querySelectorAll("details").forEach((own) => (own.open = true)));
  return page;
}

// The page's policy forbids scripts, so that the checker has a page of its own.
async function violations(browser, name) {
  const page = await open(browser, name, { bypassCSP: true });
  await page.addScriptTag({ path: axe });
  const found = await page.evaluate(() => window.axe.run());
  await page.context().close();
  return found.violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.target).join(", ")}`);
}

async function view(browser, name) {
  const page = await open(browser, name);
  await page.screenshot({ path: join(pictures, `${name}.png`), fullPage: true });
  const seen = await page.evaluate(() => ({
    wide: document.documentElement.scrollWidth > innerWidth,
    background: getComputedStyle(document.body).backgroundColor,
  }));
  await page.context().close();
  return { ...seen, accessibility: await violations(browser, name) };
}

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
try {
  const seen = { console: [], requests: new Set() };
  browser.on("context", (context) => {
    context.on("console", (message) => seen.console.push(`${message.type()}: ${message.text()}`));
    context.on("weberror", (error) => seen.console.push(`error: ${error.error()}`));
    context.on("request", (request) => seen.requests.add(request.url()));
  });
  const views = {};
  for (const name of Object.keys(VIEWS)) views[name] = await view(browser, name);
  console.log(JSON.stringify({ views, console: seen.console, requests: [...seen.requests] }));
} finally {
  await browser.close();
}
