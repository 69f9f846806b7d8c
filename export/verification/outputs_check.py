"""Whether onnxruntime's logits and greedy tokens are those of the unmerged model, within its rounding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loracle.files import Adapter

from ..generation import OneText, greedy
from ..growing_session import open_decoder
from ..loaded_task import load_task
from ..opening import open_session
from .candidate import Candidate
from .quality import Quality, measure_quality
from .report import Check

if TYPE_CHECKING:
    from .truth import Truth


@dataclass(frozen=True)
class OutputsResult:
    """The checks, the largest error of a logit and the tolerance it was held to; or what was measured
    instead, where the candidate is quantised."""

    checks: tuple[Check, ...]
    error: float | None
    tolerance: float | None
    quality: Quality | None = None


def measured(
    pairs: Iterable[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]], logits: bool
) -> OutputsResult:
    """What is said of a quantised model's outputs: their loss, and whether they are numbers.

    Args:
        pairs: (output, truth), see `measure_quality`.
        logits: whether the outputs are logits.
    """
    every = list(pairs)
    failures = [
        f"output {number}: expected shape {truth.shape}, got {got.shape}"
        for number, (got, truth) in enumerate(every, 1)
        if got.shape != truth.shape
    ]
    quality = measure_quality(((got, own) for got, own in every if got.shape == own.shape), logits=logits)
    if not quality.finite:
        failures.append("an output is NaN or infinite; check the weights, or export in fp32")
    check = Check("outputs are finite numbers", not failures, f"{quality.rows} rows", tuple(failures))
    return OutputsResult((check,), None, None, quality)


@dataclass(frozen=True)
class Generated:
    """One prompt answered by onnxruntime: all tokens, and the logits (n, vocabulary) that follow each but
    the last."""

    ids: tuple[int, ...]
    prompt_length: int
    logits: np.ndarray[Any, Any]


def generate_with_logits(session: OneText, prompt: Sequence[int], new_tokens: int) -> Generated:
    """Greedy tokens after `prompt`, through prefill and then one cached step a token."""
    tokens, rows = [], []
    for token, logits in greedy(session, prompt, new_tokens):
        tokens.append(token)
        rows.append(logits.astype(np.float64))
    return Generated((*prompt, *tokens), len(prompt), np.concatenate(rows))


def first_token_difference(
    generated: Generated, truth: np.ndarray[Any, Any], tolerance: float
) -> tuple[int, float, bool] | None:
    """The first generated token that is not the most likely one by `truth` (n, vocabulary).

    Returns:
        None where there is none; else (its position, by how much the truth prefers another token, whether
        an error of `tolerance` in both logits explains that). Logits after it belong to another text.
    """
    for position in range(generated.prompt_length, len(generated.ids)):
        row = truth[position - 1]
        token = generated.ids[position]
        if int(row.argmax()) != token:
            margin = float(row.max() - row[token])
            return position, margin, margin <= 2 * tolerance
    return None


def check_outputs(
    candidate: Candidate,
    model_dir: str | Path,
    adapter: Adapter | None,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    config: Mapping[str, Any] | None = None,
    trusted: bool = False,
) -> OutputsResult:
    """Run every prompt through onnxruntime and through the float64 model, and compare.

    No bound covers the codes of a quantised model: its error is measured.
    """
    from .truth import Float64Model

    session = open_session(candidate.graph)
    weights = load_task(candidate.weights, "cpu").weights
    runs = [
        generate_with_logits(
            open_decoder(session, len(prompt) + new_tokens, weights=weights), prompt, new_tokens
        )
        for prompt in prompts
    ]
    del session, weights
    truths = Float64Model(model_dir, adapter, config=config, trusted=trusted).evaluate(
        [run.ids[:-1] for run in runs], candidate.options.numpy_dtype
    )
    return judged(runs, truths, quantised=candidate.options.quantization is not None)


def judged(runs: Sequence[Generated], truths: Sequence[Truth], *, quantised: bool) -> OutputsResult:
    """Compare what was generated with its truth; of a quantised model, measure how far apart they are."""
    if quantised:
        return measured([(run.logits, truth.logits) for run, truth in zip(runs, truths, strict=True)], True)
    error = tolerance = worst = 0.0
    outside: list[str] = []
    tokens: list[str] = []
    unexplained: list[str] = []
    for number, (run, truth) in enumerate(zip(runs, truths, strict=True), 1):
        gap = np.abs(run.logits - truth.logits)
        largest = float(gap.max())
        if not largest <= truth.tolerance:  # NaN is outside too
            position = int(np.unravel_index(int(np.argmax(np.nan_to_num(gap, nan=np.inf))), gap.shape)[0])
            outside.append(
                f"prompt {number}, position {position}: error {largest:.3g}, tolerance {truth.tolerance:.3g}"
            )
        ratio = largest / truth.tolerance
        if not ratio < worst:
            worst, error, tolerance = ratio, largest, truth.tolerance
        difference = first_token_difference(run, truth.logits, truth.tolerance)
        if difference is not None:
            where, margin, explained = difference
            line = f"prompt {number}, token {where - run.prompt_length}: margin {margin:.3g}"
            (tokens if explained else unexplained).append(line)
    positions = sum(len(run.logits) for run in runs)
    count = sum(len(run.ids) - run.prompt_length for run in runs)
    explained_figure = f"; ties within the bound: {'; '.join(tokens)}" if tokens else ""
    return OutputsResult(
        (
            Check(
                "logits lie inside the derived bound",
                not outside,
                f"largest error {error:.2g} of {tolerance:.2g} allowed, {positions} positions",
                tuple(outside),
            ),
            Check(
                "greedy tokens agree",
                not unexplained,
                f"{count} tokens, {len(runs)} prompts{explained_figure}",
                tuple(unexplained),
            ),
        ),
        error,
        tolerance,
    )
