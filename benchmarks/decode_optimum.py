"""Optimum's decoder in a process of its own, with its older packages: a request a line, an answer a line.

    PYTHON -m benchmarks.decode_optimum FOLDER THREADS

`{"open": io_binding}` loads the model, `{"prompt": [...], "new_tokens": n}` answers. Ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM

from .decode_transformers import timed_generate


def opened(folder: str, threads: int, io_binding: bool) -> Any:
    """The model with a session of so many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return ORTModelForCausalLM.from_pretrained(folder, session_options=options, use_io_binding=io_binding)


def main() -> None:
    folder, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    # Whatever a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model = None
    for line in sys.stdin:
        request = json.loads(line)
        if "open" in request:
            model = None
            model = opened(folder, threads, request["open"])
            answer: dict[str, Any] = {}
        else:
            answer = asdict(timed_generate(model, request["prompt"], request["new_tokens"], {}))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
