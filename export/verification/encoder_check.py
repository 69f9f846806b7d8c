"""Whether onnxruntime's outputs of a model without a cache are the unmerged model's, within its rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from loracle.files import Adapter
from loracle.reference import FileError

from ..encoder_inputs import Feeds, image_inputs, text_inputs
from ..names import ATTENTION_MASK, INPUT_IDS, LAST_HIDDEN_STATE, PIXEL_VALUES, TOKEN_TYPE_IDS
from ..opening import open_session
from ..tasks import Task
from ..texts import Texts
from .candidate import Candidate
from .outputs_check import OutputsResult, measured
from .report import Check

if TYPE_CHECKING:
    from .truth import Float64Model

Array = np.ndarray[Any, Any]

_INPUTS = (INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS, PIXEL_VALUES)


@dataclass(frozen=True)
class Compared:
    """One output for some inputs: what came, what is right, how far off it may be, and the entries that
    count: those at (row, position) where there is a mask of them."""

    got: Array
    truth: Array
    tolerance: float
    counted: Array | None


def check_encoder(
    task: Task,
    candidate: Candidate,
    model_dir: str | Path,
    adapter: Adapter | None,
    config: Mapping[str, Any],
    texts: Texts | None,
    *,
    trusted: bool = False,
) -> OutputsResult:
    """Run the texts, or without them images drawn from a seed, through both models, and compare.

    Raises:
        FileError: the graph has other inputs or outputs than a model of this task.
        ShapeError: a text has more tokens than the model has positions.
    """
    from .truth import Float64Model

    session = open_session(candidate.graph)
    _check_interface(session, task, candidate.graph)
    entries = {entry.name: entry for entry in session.get_inputs()}
    if texts is None:
        batches = [image_inputs(entries[PIXEL_VALUES].shape[1:], candidate.options.numpy_dtype)]
    else:
        batches = text_inputs(texts, frozenset(entries), config)
    names = list(task.outputs)
    answers = [session.run(names, {**feeds, **candidate.weights}) for feeds in batches]
    del session
    return judge_answers(
        task,
        batches,
        answers,
        Float64Model(model_dir, adapter, task, config, trusted=trusted),
        candidate.options.numpy_dtype,
        quantised=candidate.options.quantization is not None,
    )


def judge_answers(
    task: Task,
    batches: Sequence[Feeds],
    answers: Sequence[Sequence[Array]],
    model: Float64Model,
    dtype: np.dtype[Any],
    *,
    quantised: bool,
) -> OutputsResult:
    """Compare what was answered to each batch with its truth; of a quantised model, measure how far apart
    they are.

    Args:
        batches: inputs, by the names that the model's forward has for them.
        answers: to each of them the task's outputs.
        dtype: in which the candidate is stored.
    """
    compared = []
    for feeds, got in zip(batches, answers, strict=True):
        truths = model.evaluate_feeds(feeds, dtype)
        mask = feeds.get(ATTENTION_MASK)
        for name, own in zip(task.outputs, got, strict=True):
            truth = truths[name]
            counted = None if mask is None or task.pooled else mask.astype(bool)
            compared.append(Compared(own, truth.logits, truth.tolerance, counted))
    if quantised:
        return measured(_counted(task, compared), task.outputs != (LAST_HIDDEN_STATE,))
    return _judged(task, compared)


def _check_interface(session: onnxruntime.InferenceSession, task: Task, graph: Path) -> None:
    unknown = [entry.name for entry in session.get_inputs() if entry.name not in _INPUTS]
    if unknown:
        raise FileError(
            f"{graph}: {unknown[0]}: expected no input but {', '.join(_INPUTS)}, found one; "
            "export with `loracle export`"
        )
    held = {entry.name for entry in session.get_outputs()}
    for name in task.outputs:
        if name not in held:
            raise FileError(f"{graph}: {name}: expected among the outputs for {task.name}, found none")


def _judged(task: Task, compared: list[Compared]) -> OutputsResult:
    error = tolerance = worst = 0.0
    outside: list[str] = []
    for number, one in enumerate(compared, 1):
        if one.got.shape != one.truth.shape:
            outside.append(f"output {number}: expected shape {one.truth.shape}, got {one.got.shape}")
            continue
        gap = np.abs(one.got.astype(np.float64) - one.truth)
        if one.counted is not None:
            gap[~one.counted] = 0.0
        largest = float(gap.max())
        if not largest <= one.tolerance:  # NaN is outside too
            place = np.unravel_index(int(np.argmax(np.nan_to_num(gap, nan=np.inf))), gap.shape)
            where = ",".join(str(int(index)) for index in place)
            outside.append(f"output {number} [{where}]: error {largest:.3g}, tolerance {one.tolerance:.3g}")
        # Outputs that depend on nothing have no tolerance.
        ratio = largest / one.tolerance if largest else 0.0
        if not ratio < worst:
            worst, error, tolerance = ratio, largest, one.tolerance
    count = sum(one.truth.size for one in compared)
    bound = Check(
        f"{'states' if task.outputs == (LAST_HIDDEN_STATE,) else 'logits'} lie inside the derived bound",
        not outside,
        f"largest error {error:.2g} of {tolerance:.2g} allowed, {count} entries",
        tuple(outside),
    )
    comparable = [one for one in compared if one.got.shape == one.truth.shape]
    checks = (bound,) if task.outputs == (LAST_HIDDEN_STATE,) else (bound, _answers_check(task, comparable))
    return OutputsResult(checks, error, tolerance)


def _counted(task: Task, compared: list[Compared]) -> Iterator[tuple[Array, Array]]:
    """The entries that count of each output and its truth; of a question, a row for each text."""
    for one in compared:
        if one.counted is None or one.got.shape != one.truth.shape:
            yield one.got, one.truth
        elif task.name == "question-answering":
            rows = zip(one.got, one.truth, one.counted, strict=True)
            yield from ((got[counted], truth[counted]) for got, truth, counted in rows)
        else:
            yield one.got[one.counted], one.truth[one.counted]


def _answers_check(task: Task, compared: list[Compared]) -> Check:
    """Whether the most likely answers are the truth's, where two errors within the bound cannot explain it.

    An answer is a class for each row, or each position; of a question, a position for each row.
    """
    count = 0
    ties: list[str] = []
    unexplained: list[str] = []
    for number, one in enumerate(compared, 1):
        got, truth = one.got.astype(np.float64), one.truth
        if task.name == "question-answering" and one.counted is not None:
            got, truth = (np.where(one.counted, array, -np.inf) for array in (got, truth))
            counted = np.ones(len(truth), bool)
        else:
            counted = np.ones(truth.shape[:-1], bool) if one.counted is None else one.counted
        count += int(counted.sum())
        chosen = np.where(np.isnan(got), -np.inf, got).argmax(-1)
        for where in zip(*np.nonzero((chosen != truth.argmax(-1)) & counted), strict=True):
            margin = float(truth[where].max() - truth[where][chosen[where]])
            line = f"output {number} [{','.join(str(int(i)) for i in where)}]: margin {margin:.3g}"
            (ties if margin <= 2 * one.tolerance else unexplained).append(line)
    figure = f"{count} answers" + (f"; ties within the bound: {'; '.join(ties)}" if ties else "")
    return Check("most likely answers agree", not unexplained, figure, tuple(unexplained))
