"""A task's greedy tokens with onnxruntime alone: python plain_onnxruntime.py GRAPH PROMPT COUNT [TENSORS]

GRAPH: model.onnx, a linked task's graph, or swappable.onnx with the task's tensors; PROMPT: tokens, as JSON.
"""

import json
import sys

import numpy as np
import onnxruntime
from safetensors.numpy import load_file

graph, prompt, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
task = load_file(sys.argv[4]) if len(sys.argv) > 4 else {}

session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
past = {
    entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
    for entry in session.get_inputs()
    if entry.name.startswith("past_key_values")
}
tokens, new = list(prompt), list(prompt)
for _ in range(count):
    inputs = {"input_ids": np.array([new]), "attention_mask": np.ones((1, len(tokens)), np.int64)}
    outputs = dict(zip(names, session.run(None, {**inputs, **past, **task}), strict=True))
    new = [int(outputs.pop("logits")[0, -1].argmax())]
    tokens += new
    past = {name.replace("present", "past_key_values"): array for name, array in outputs.items()}
print(json.dumps(tokens[len(prompt) :]))
