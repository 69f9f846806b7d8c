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
from loracle.export.graphs import graph_files
from loracle.export.tasks import TASKS
from loracle.export.verification.truth import Float64Model
from loracle.files import read_adapter
from loracle.torch_impl import LoraConfig, inject, save_adapter

FLOAT32 = np.dtype(np.float32)
TASK = {task.name: task for task in TASKS}
PROMPT, STEPS = 7, 3
EXPORTED = list(CASES)


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
    paths = [str(work / "onnx" / file) for file in graph_files(TASK[case.task])]
    nodes = [node for path in paths for node in onnx.load(path, load_external_data=False).graph.node]
    fused = {node.op_type for node in nodes if node.domain == "com.microsoft"}
    fused |= {"SimplifiedLayerNormalization"} & {node.op_type for node in nodes}
    sessions = [onnxruntime.InferenceSession(path, _quiet()) for path in paths]
    tuned = Float64Model(base, read_adapter(adapter), TASK[case.task])
    untuned = Float64Model(base, None, TASK[case.task])
    gaps = compare(name, sessions, tuned, untuned)
    error, tolerance, _ = max(gaps, key=lambda gap: gap[0] / gap[1])
    (architecture,) = hf.AutoConfig.from_pretrained(base).architectures
    return Outcome(
        name, architecture, case.task, error, tolerance, min(gap[2] for gap in gaps), tuple(sorted(fused))
    )


def _quiet() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def without_optimisations() -> onnxruntime.SessionOptions:
    """Options by which onnxruntime runs a graph as it stands."""
    options = _quiet()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


Gap = tuple[float, float, float]
"""Largest error, what is allowed, largest difference from the base model's answer."""


Sessions = list[onnxruntime.InferenceSession]


def compare(name: str, sessions: Sessions, tuned: Float64Model, untuned: Float64Model) -> list[Gap]:
    """The gaps of a case's answers, by sessions over its graphs."""
    kinds = {"text-generation": _decoded, "text2text-generation": _translated}
    return list(kinds.get(CASES[name].task, _encoded)(name, sessions, tuned, untuned))


def _encoded(name: str, sessions: Sessions, tuned: Float64Model, untuned: Float64Model) -> Iterator[Gap]:
    (session,) = sessions
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


def _translated(name: str, sessions: Sessions, tuned: Float64Model, untuned: Float64Model) -> Iterator[Gap]:
    """A batch of two, the second source shorter; the decoder's first three tokens, then one at a time."""
    inputs = feeds(name)
    answers = np.concatenate(list(_translation_steps(sessions, inputs)), 1)
    truths, bases = tuned.evaluate_feeds(inputs, FLOAT32), untuned.evaluate_feeds(inputs, FLOAT32, samples=1)
    yield (
        float(np.abs(answers - truths["logits"].logits).max()),
        truths["logits"].tolerance,
        float(np.abs(answers - bases["logits"].logits).max()),
    )


def _translation_steps(sessions: Sessions, inputs: dict[str, NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """The logits of the decoder's steps; the keys and values of the encoder's states are the first's."""
    encoder, first, later = sessions
    ids, mask = inputs["decoder_input_ids"], {"encoder_attention_mask": inputs["attention_mask"]}
    (states,) = encoder.run(
        None, {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    )
    cache: dict[str, NDArray[Any]] = {}
    for start, stop in ((0, 3), *((at, at + 1) for at in range(3, ids.shape[1]))):
        session, given = (later, cache) if start else (first, {"encoder_hidden_states": states})
        names = [entry.name for entry in session.get_outputs()]
        logits, *present = session.run(None, {"input_ids": ids[:, start:stop], **mask, **given})
        yield logits
        cache |= {
            name.replace("present", "past_key_values"): value
            for name, value in zip(names[1:], present, strict=True)
        }


def _decoded(name: str, sessions: Sessions, tuned: Float64Model, untuned: Float64Model) -> Iterator[Gap]:
    """A batch of two, the second shorter and padded on either side; then a step for each token more."""
    (session,) = sessions
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
