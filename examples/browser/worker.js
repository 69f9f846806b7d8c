// Loads a model when it is first asked, and answers one text after the other.

import { env, pipeline, TextStreamer } from "./vendor/transformers.js";

const here = (path) => new URL(path, self.location.href);

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = here("models/").pathname;
// Files of another build under the same names would be taken from the cache.
env.useBrowserCache = false;
env.useWasmCache = false;
env.backends.onnx.wasm.wasmPaths = {
  mjs: here("vendor/ort.mjs").href,
  wasm: here("vendor/ort.wasm").href,
};
// More than one needs a page that is cross-origin isolated, as serve.py makes it.
env.backends.onnx.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

// Tells how much of the data file is there.
env.fetch = async (url, options) => {
  const response = await fetch(url, options);
  if (!response.ok || !String(url).endsWith(".onnx_data")) return response;
  const total = Number(response.headers.get("content-length"));
  let loaded = 0;
  const counted = new TransformStream({
    transform(chunk, controller) {
      loaded += chunk.byteLength;
      self.postMessage({ type: "loading", loaded, total });
      controller.enqueue(chunk);
    },
  });
  return new Response(response.body.pipeThrough(counted), response);
};

const loaded = new Map();

function load(model) {
  if (!loaded.has(model.id)) {
    const options = {
      device: "wasm",
      dtype: "fp32", // no suffix behind the graph's name
      subfolder: "",
      model_file_name: model.graph,
      session_options: { externalData: model.data.map((name) => ({ path: name, data: name })) },
    };
    const made = pipeline(model.task, model.folder, options);
    made.catch(() => loaded.delete(model.id));
    loaded.set(model.id, made);
  }
  return loaded.get(model.id);
}

const answers = {
  async "text-classification"(classify, text) {
    return { scores: await classify(text, { top_k: null }) };
  },
  async "text-generation"(write, text, model) {
    let tokens = 0;
    const streamer = new TextStreamer(write.tokenizer, {
      skip_prompt: true,
      skip_special_tokens: true,
      callback_function: (piece) => self.postMessage({ type: "piece", piece }),
      token_callback_function: (found) => (tokens += found.length),
    });
    const messages = [{ role: "user", content: text }];
    await write(messages, { max_new_tokens: model.max_new_tokens, do_sample: false, streamer });
    return { tokens };
  },
};

async function answer({ model, text }) {
  const ready = await load(model);
  self.postMessage({ type: "loaded" });
  const start = performance.now();
  const result = await answers[model.task](ready, text, model);
  self.postMessage({ type: "done", result: { ...result, milliseconds: performance.now() - start } });
}

self.addEventListener("message", ({ data }) => {
  answer(data).catch((error) => self.postMessage({ type: "failed", message: String(error.message ?? error) }));
});
