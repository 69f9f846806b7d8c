// The page: which model, which text, and what the worker answers.

const find = (id) => document.getElementById(id);
const [form, text, submit, status] = ["form", "text", "submit", "status"].map(find);
const [progress, answer, written, scores] = ["progress", "answer", "written", "scores"].map(find);

const worker = new Worker("worker.js", { type: "module" });
let models = [];
let busy = false;

function chosen() {
  return models.find((model) => model.id === new FormData(form).get("model"));
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function say(line, wrong = false) {
  status.textContent = line;
  status.classList.toggle("wrong", wrong);
}

function setBusy(value) {
  busy = value;
  find("models").disabled = value;
  // A button that is disabled would lose the focus.
  submit.setAttribute("aria-disabled", String(value));
  answer.setAttribute("aria-busy", String(value));
}

function showModel() {
  const model = chosen();
  find("text-label").textContent = model.prompt;
  submit.textContent = model.action;
  const examples = model.examples.map((example) => {
    const button = element("button", { type: "button" }, example);
    button.addEventListener("click", () => {
      text.value = example;
      text.focus();
    });
    return button;
  });
  find("examples").replaceChildren(element("span", {}, "For example:"), ...examples);
  answer.hidden = true;
  say("");
}

function choice(model, first) {
  const input = element("input", { type: "radio", name: "model", value: model.id, checked: first });
  input.addEventListener("change", showModel);
  const size = `${Math.round(model.bytes / 1e6)} MB, loaded once`;
  return element(
    "label",
    { className: "model" },
    input,
    element("span", {}, model.title),
    element("small", {}, `${model.about} ${size}.`),
  );
}

function showScores(found) {
  scores.replaceChildren(
    ...found.flatMap(({ label, score }) => {
      const percent = `${(100 * score).toFixed(1)}%`;
      const filled = element("span");
      filled.style.width = percent;
      const bar = element("dd", { className: "bar" }, filled);
      bar.setAttribute("aria-hidden", "true");
      return [element("dt", {}, label), bar, element("dd", { className: "number" }, percent)];
    }),
  );
  scores.hidden = false;
}

function took(milliseconds, tokens) {
  const seconds = milliseconds / 1000;
  if (tokens === undefined) return `${Math.round(milliseconds)} ms`;
  return `${tokens} tokens in ${seconds.toFixed(1)} s, ${(tokens / seconds).toFixed(1)} a second`;
}

const received = {
  loading({ loaded, total }) {
    progress.hidden = false;
    progress.value = total ? loaded / total : 0;
  },
  loaded() {
    progress.hidden = true;
    say("Computing");
  },
  piece({ piece }) {
    written.hidden = answer.hidden = false;
    written.textContent += piece;
  },
  done({ result }) {
    answer.hidden = false;
    if (result.scores) showScores(result.scores);
    say(took(result.milliseconds, result.tokens));
    setBusy(false);
  },
  failed({ message }) {
    progress.hidden = true;
    say(message, true);
    setBusy(false);
  },
};

worker.addEventListener("message", ({ data }) => received[data.type](data));
worker.addEventListener("error", (event) => received.failed({ message: event.message || "The worker did not start." }));

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const asked = { model: chosen(), text: text.value.trim() };
  if (busy || !asked.model || !asked.text) return;
  answer.hidden = written.hidden = scores.hidden = true;
  written.textContent = "";
  setBusy(true);
  say("Loading the model");
  worker.postMessage(asked);
});

text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});

async function start() {
  const response = await fetch("models.json");
  if (!response.ok) throw new Error(`models.json: ${response.status}`);
  models = await response.json();
  find("models").append(...models.map((model, place) => choice(model, place === 0)));
  showModel();
}

start().catch((error) => received.failed({ message: `The list of models could not be read: ${error.message}` }));
