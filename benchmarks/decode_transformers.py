"""transformers' `generate`, which Optimum has too, timed to its first token and from there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from .answer import Answer


class Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when `generate` hands over the prompt, and then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def timed_generate(model: Any, prompt: Sequence[int], new_tokens: int, options: Mapping[str, Any]) -> Answer:
    """Answer greedily. The model's `generation_config` is changed: no token ends an answer."""
    model.generation_config.eos_token_id = None
    tokens = torch.tensor([list(prompt)], device=model.device)
    clock = Clock()
    with torch.inference_mode():
        start = time.perf_counter()
        text = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
            **options,
        )
    _, first, *_, last = (*clock.times, clock.times[-1])
    return Answer(tuple(text[0, len(prompt) :].tolist()), first - start, last - first)
