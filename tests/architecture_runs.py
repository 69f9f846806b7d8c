"""An architecture merged, exported and run by onnxruntime, beside its unmerged self in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import transformers as hf
from architectures import AUTO, CASES, FIRST_TOKEN, VOCABULARY, feeds, make
from numpy.typing import NDArray

from loracle.export import export
from loracle.export.tasks import TASKS
from loracle.export.truth import Float64Model
from loracle.files import read_adapter
from loracle.torch_impl import LoraConfig, inject, save_adapter

FLOAT32 = np.dtype(np.float32)
TASK = {task.name: task for task in TASKS}
PROMPT, STEPS = 7, 3
REFUSED = ("t5", "bart", "mixtral", "qwen3_moe")
EXPORTED = [name for name in CASES if name not in REFUSED]


@dataclass(frozen=True)
class Outcome:
    """What came out of one case.

    Attributes:
        model: transformers' class.
        error: the largest difference of an output that counts from the truth's, and `tolerance` for it.
        effect: the largest difference from the truth of the base model, without the adapter.
        fused: the operators of onnxruntime's own that the graph has.
    """

    name: str
    model: str
    task: str
    error: float
    tolerance: float
    effect: float
    fused: tuple[str, ...]


def make_adapter(base: Path, name: str, folder: Path) -> Path:
    """An adapter of all linear layers of a case, none of whose factors is zero."""
    model = getattr(hf, AUTO[CASES[name].task]).from_pretrained(base)
    generator = torch.Generator().manual_seed(5)
    # A headless model has a pooler, which its states do not depend on.
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=".*pooler.*")
    inject(model, config, generator=generator)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.normal_(std=0.1, generator=generator)
    save_adapter(model, folder)
    return folder


def run(name: str, work: Path) -> Outcome:
    """Export a case merged, and compare what it answers."""
    case = CASES[name]
    base = make(work / "base", name)
    adapter = make_adapter(base, name, work / "adapter")
    export(base, work / "onnx", adapter)
    graph = onnx.load(str(work / "onnx/model.onnx"), load_external_data=False).graph
    fused = {node.op_type for node in graph.node if node.domain == "com.microsoft"}
    fused |= {"SimplifiedLayerNormalization"} & {node.op_type for node in graph.node}
    session = onnxruntime.InferenceSession(str(work / "onnx/model.onnx"), _quiet())
    tuned = Float64Model(base, read_adapter(adapter), TASK[case.task])
    untuned = Float64Model(base, None, TASK[case.task])
    compare = _decoded if case.task == "text-generation" else _encoded
    gaps = list(compare(name, session, tuned, untuned))
    error, tolerance, _ = max(gaps, key=lambda gap: gap[0] / gap[1])
    (architecture,) = hf.AutoConfig.from_pretrained(base).architectures
    return Outcome(
        name, architecture, case.task, error, tolerance, min(gap[2] for gap in gaps), tuple(sorted(fused))
    )


def _quiet() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


Gap = tuple[float, float, float]
"""Largest error, what is allowed, largest difference from the base model's answer."""


def _encoded(
    name: str, session: onnxruntime.InferenceSession, tuned: Float64Model, untuned: Float64Model
) -> Iterator[Gap]:
    inputs = feeds(name)
    wanted = {entry.name for entry in session.get_inputs()}
    assert wanted == set(inputs), "the graph's inputs are the model's"
    answers = dict(
        zip([entry.name for entry in session.get_outputs()], session.run(None, inputs), strict=True)
    )
    truths, bases = tuned.evaluate_feeds(inputs, FLOAT32), untuned.evaluate_feeds(inputs, FLOAT32, samples=1)
    assert list(answers) == list(truths)
    mask = inputs.get("attention_mask")
    for output, truth in truths.items():
        counts: Any = slice(None)
        if mask is not None and truth.logits.shape[:2] == mask.shape:
            counts = mask == 1
        yield (
            float(np.abs(answers[output] - truth.logits)[counts].max()),
            truth.tolerance,
            float(np.abs(answers[output] - bases[output].logits)[counts].max()),
        )


def _decoded(
    name: str, session: onnxruntime.InferenceSession, tuned: Float64Model, untuned: Float64Model
) -> Iterator[Gap]:
    """A batch of two, the second shorter and padded on either side; then a step for each token more."""
    rng = np.random.default_rng(1)
    texts = rng.integers(FIRST_TOKEN, VOCABULARY, (2, PROMPT + STEPS))
    whole = [
        np.concatenate([text[:length], text[PROMPT:]]).tolist()
        for text, length in zip(texts, _LENGTHS, strict=True)
    ]
    truths, bases = tuned.evaluate(whole, FLOAT32), untuned.evaluate(whole, FLOAT32, samples=1)
    for side in ("left", "right"):
        logits = list(_steps(session, texts, side))
        for row, (length, truth, base) in enumerate(zip(_LENGTHS, truths, bases, strict=True)):
            place = slice(PROMPT - length, None) if side == "left" else slice(None, length)
            got = np.concatenate([logits[0][row, place], *(step[row] for step in logits[1:])])
            yield (
                float(np.abs(got - truth.logits).max()),
                truth.tolerance,
                float(np.abs(got - base.logits).max()),
            )


_LENGTHS = (PROMPT, PROMPT - 3)


def _steps(session: onnxruntime.InferenceSession, texts: NDArray[Any], side: str) -> Iterator[NDArray[Any]]:
    """The logits of the prompts, and of each further token, from a cache that grows."""
    mask = np.ones((2, PROMPT), np.int64)
    ids = texts[:, :PROMPT].copy()
    short = _LENGTHS[1]
    mask[1, :] = np.arange(PROMPT) >= PROMPT - short if side == "left" else np.arange(PROMPT) < short
    ids[1] = 0
    ids[1, mask[1] == 1] = texts[1, :short]
    past = {
        entry.name: np.zeros((2, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values")
    }
    names = [entry.name for entry in session.get_outputs()]
    for step in range(STEPS + 1):
        answers = session.run(None, {"input_ids": ids, "attention_mask": mask, **past})
        yield answers[0]
        past = {
            name.replace("present", "past_key_values"): value
            for name, value in zip(names[1:], answers[1:], strict=True)
        }
        ids = texts[:, PROMPT + step : PROMPT + step + 1]
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], 1)
