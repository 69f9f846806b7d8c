// What transformers.js answers with exported folders under Node.js, as JSON.
//
//     node transformers.mjs '{"generate": [{"folder", "graph", "prompts", "chats", "count"}, ...],
//                             "classify": {"folder", "texts"}}'

import { env, LogLevel, pipeline, Tensor } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.logLevel = LogLevel.ERROR;

// Without the first of them transformers.js looks for onnx/GRAPH.onnx.
const options = (graph) => ({ subfolder: "", model_file_name: graph, dtype: "fp32" });

const integers = (values, shape) => new Tensor("int64", values.map(BigInt), shape);

async function tokens(model, prompts, count) {
  const longest = Math.max(...prompts.map((prompt) => prompt.length));
  const padding = prompts.map((prompt) => Array(longest - prompt.length).fill(0));
  const shape = [prompts.length, longest];
  const answer = await model.generate({
    input_ids: integers(prompts.flatMap((prompt, row) => [...padding[row], ...prompt]), shape),
    attention_mask: integers(prompts.flatMap((prompt, row) => [...padding[row], ...prompt.map(() => 1)]), shape),
    max_new_tokens: count,
    do_sample: false,
  });
  return answer.tolist().map((row) => row.slice(longest).map(Number));
}

async function generate({ folder, graph, prompts, chats, count }) {
  const write = await pipeline("text-generation", folder, options(graph));
  const alone = [];
  for (const prompt of prompts) alone.push(...(await tokens(write.model, [prompt], count)));
  const batch = await tokens(write.model, prompts, count);
  const written = [];
  for (const content of chats) {
    const [answer] = await write([{ role: "user", content }], { max_new_tokens: count, do_sample: false });
    written.push(answer.generated_text.at(-1).content);
  }
  await write.dispose();
  return { alone, batch, written };
}

async function classify({ folder, texts }) {
  const label = await pipeline("text-classification", folder, options("model"));
  return label(texts, { top_k: null });
}

const request = JSON.parse(process.argv[2]);
const generated = [];
for (const asked of request.generate ?? []) generated.push(await generate(asked));
const classified = request.classify ? await classify(request.classify) : null;
console.log(JSON.stringify({ generated, classified }));
