"""onnxruntime-genai's own loop, timed to its first token and from there."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai

from .answer import Answer


def open_model(folder: Path, threads: int, end: int) -> onnxruntime_genai.Model:
    """A folder with a `genai_config.json`; only `end` ends an answer: it insists on a token that does."""
    config = onnxruntime_genai.Config(str(folder))
    options = {"intra_op_num_threads": threads}
    # A list would be joined to the folder's own.
    config.overlay(json.dumps({"model": {"eos_token_id": end, "decoder": {"session_options": options}}}))
    return onnxruntime_genai.Model(config)


def open_generator(model: onnxruntime_genai.Model, capacity: int) -> onnxruntime_genai.Generator:
    """Room for one greedy answer and its prompt."""
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=capacity, do_sample=False)
    return onnxruntime_genai.Generator(model, parameters)


def timed_generator(generator: onnxruntime_genai.Generator, prompt: Sequence[int], new_tokens: int) -> Answer:
    """Answer with a fresh generator."""
    tokens = np.array([prompt], np.int32)
    start = time.perf_counter()
    generator.append_tokens(tokens)
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        generator.generate_next_token()
    end = time.perf_counter()
    text = generator.get_sequence(0)[len(prompt) :]
    return Answer(tuple(int(token) for token in text), first - start, end - first)
