"""What Optimum answers with exported folders, as JSON; runs with the packages of benchmarks/peers.txt.

PYTHON optimum_run.py '{"decoders": [{"folder", "file", "binding", "prompts", "count"}, ...],
                        "classifier": {"folder", "inputs", "threads"}}'
"""

from __future__ import annotations

import json
import sys
from typing import Any

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSequenceClassification


def answers(
    folder: str, file: str, binding: bool, prompts: list[list[int]], count: int
) -> dict[str, list[list[int]]]:
    """The tokens after each prompt: one by one, and as a batch that is padded on the left."""
    model = ORTModelForCausalLM.from_pretrained(folder, file_name=file, use_io_binding=binding)
    options = {"max_new_tokens": count, "do_sample": False}
    alone = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        alone.append(
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        )
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    batch = model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()
    return {"alone": alone, "batch": batch}


def classified(folder: str, inputs: dict[str, Any], threads: int) -> dict[str, Any]:
    """The labels of a batch and the logits' bits."""
    session = onnxruntime.SessionOptions()
    session.intra_op_num_threads = threads
    model = ORTModelForSequenceClassification.from_pretrained(folder, session_options=session)
    logits = model(**{name: torch.tensor(rows) for name, rows in inputs.items()}).logits
    labels = [model.config.id2label[int(place)] for place in logits.argmax(-1)]
    return {
        "labels": labels,
        "logits": logits.numpy().tobytes().hex(),
        "onnxruntime": onnxruntime.__version__,
    }


def main() -> None:
    request = json.loads(sys.argv[1])
    found: dict[str, Any] = {"decoders": [answers(**decoder) for decoder in request.get("decoders", ())]}
    if "classifier" in request:
        found["classifier"] = classified(**request["classifier"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
