"""The ways of answering a prompt that `benchmarks.decode` compares: all greedy, none of them stops early.

A way opens its model anew on request: where a model's memory happens to lie makes it a few percent faster or
slower for as long as it lives.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracle.export import DecoderSession, open_session

from .answer import Answer
from .decode_genai import open_generator, open_model, timed_generator
from .decode_loop import timed_loop
from .decode_transformers import timed_generate
from .interleaved import Opened

OURS = "loracle"
CONTROL = "A/A control"
BASE = "base model"
UNMERGED = "adapter unmerged"
GENAI = "onnxruntime-genai"
GENAI_OURS = "genai, our graph"
TRANSFORMERS = "transformers"
OPTIMUM = "Optimum"
WAYS = (CONTROL, BASE, UNMERGED, GENAI, GENAI_OURS, TRANSFORMERS, OPTIMUM)
"""What is compared with `OURS`, in order."""

Open = Callable[[], Opened]
"""Loads the model."""

_TRIAL_TOKENS = 32
_TRIALS = 2
ATTENTION = ("sdpa", "eager")
CACHES = ("dynamic", "static")


@dataclass(frozen=True)
class Subject:
    """A name of `WAYS`, or `OURS`, and how its model is opened."""

    name: str
    open: Open


class ForcedSession(DecoderSession):
    """Reads the tokens of a given text, whatever was chosen, so that it does another model's work."""

    def force(self, text: Sequence[int]) -> None:
        """Let `text` follow the prompt."""
        self._text = iter(text)

    def decode(self, tokens: Any) -> Any:
        return super().decode([next(self._text)])


def ours(folder: Path, threads: int) -> Opened:
    """An exported folder in our session."""
    session = open_session(folder, threads)

    def answer(prompt: Sequence[int], new_tokens: int) -> Answer:
        return timed_loop(DecoderSession(session, len(prompt) + new_tokens), prompt, new_tokens)

    return answer


def ours_forced(folder: Path, threads: int, texts: Mapping[tuple[int, ...], Sequence[int]]) -> Opened:
    """As `ours`, but what follows a prompt are the tokens of ``texts[prompt]``."""
    session = open_session(folder, threads)

    def answer(prompt: Sequence[int], new_tokens: int) -> Answer:
        decoder = ForcedSession(session, len(prompt) + new_tokens)
        decoder.force(texts[tuple(prompt)])
        return timed_loop(decoder, prompt, new_tokens)

    return answer


def genai(folder: Path, threads: int, texts: Mapping[tuple[int, ...], Sequence[int]]) -> Opened:
    """A folder with a `genai_config.json` in onnxruntime-genai.

    It insists on a token that ends an answer, so that becomes one that is not in `texts`.
    """
    held = {token for text in texts.values() for token in text}
    end = next(token for token in range(len(held) + 1) if token not in held)
    model = open_model(folder, threads, end)

    def answer(prompt: Sequence[int], new_tokens: int) -> Answer:
        return timed_generator(open_generator(model, len(prompt) + new_tokens), prompt, new_tokens)

    return answer


def transformers(checkpoint: Path, attention: str, cache: str) -> Opened:
    """A checkpoint in transformers' `generate`, with torch's threads."""
    import torch
    from transformers import AutoModelForCausalLM

    from loracle.torch_impl.loading import quiet_transformers

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation=attention, local_files_only=True
        )
    options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}

    def answer(prompt: Sequence[int], new_tokens: int) -> Answer:
        return timed_generate(model, prompt, new_tokens, options)

    return answer


def best_transformers(checkpoint: Path, prompt: Sequence[int]) -> tuple[dict[str, str], Open]:
    """The settings with which transformers answers a little fastest, and how it is opened with them."""

    answers = {
        (attention, cache): transformers(checkpoint, attention, cache)
        for attention in ATTENTION
        for cache in CACHES
    }
    taken: dict[tuple[str, str], list[float]] = {settings: [] for settings in answers}
    for _ in range(_TRIALS + 1):
        for settings, answer in answers.items():
            taken[settings].append(answer(prompt, _TRIAL_TOKENS).rest)
    attention, cache = min(taken, key=lambda settings: min(taken[settings][1:]))
    return {"attention": attention, "cache": cache}, lambda: transformers(checkpoint, attention, cache)


class OptimumProcess:
    """A process with Optimum's packages that answers on request, through its input and output."""

    def __init__(self, python: Path, folder: Path, threads: int) -> None:
        command = [str(python), "-m", "benchmarks.decode_optimum", str(folder), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"benchmarks.decode_optimum ended with exit code {self._process.wait()}")
        return json.loads(line)

    def open(self, io_binding: bool) -> Opened:
        """Load the model in the process, in place of what it had."""
        self._ask({"open": io_binding})

        def answer(prompt: Sequence[int], new_tokens: int) -> Answer:
            found = self._ask({"prompt": list(prompt), "new_tokens": new_tokens})
            return Answer(tuple(found["tokens"]), found["first"], found["rest"])

        return answer

    def best(self, prompt: Sequence[int]) -> tuple[dict[str, bool], Open]:
        """As `best_transformers`, of what Optimum lets one choose."""

        def seconds(io_binding: bool) -> float:
            answer = self.open(io_binding)
            answer(prompt, _TRIAL_TOKENS)
            return min(answer(prompt, _TRIAL_TOKENS).rest for _ in range(_TRIALS))

        io_binding = min((False, True), key=seconds)
        return {"io_binding": io_binding}, lambda: self.open(io_binding)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def optimum_process(python: Path, folder: Path, threads: int) -> Iterator[OptimumProcess]:
    """An `OptimumProcess`, which is ended."""
    process = OptimumProcess(python, folder, threads)
    try:
        yield process
    finally:
        process.close()
