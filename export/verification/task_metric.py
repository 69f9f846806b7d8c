"""What a model is worth on the user's own data: before training, after it, and as the candidate.

Of a language model the perplexity, of a classifier the accuracy. The candidate's mean loss is held to the
bound that follows from that of its logits. A loss is ``log sum_t exp(z_t) - z_y``. Where no logit is off by
more than e, neither is the logarithm of the sum (it grows with each logit, and adding e to all of them adds
e to it), nor z_y; so a loss is off by at most 2 e, and a mean of losses by at most the mean of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from loracle.files import Adapter, Checkpoint, MergedWeights
from loracle.reference import ConfigError
from loracle.torch_impl.metrics import score_metrics
from loracle.torch_impl.scores import Scores

from ..names import ATTENTION_MASK, INPUT_IDS
from ..tasks import Task
from .asked import DATA_ROWS
from .foreign_outputs import answer, open_foreign
from .foreign_session import ForeignDecoder
from .one_weight import coarser
from .report import Check
from .task_data import Batch, LabelledRows, labelled_rows
from .truth import Float64Model
from .weight_products import is_quantized, multiplied_dtype

Array = np.ndarray[Any, Any]

LENGTH = 256
"""How many tokens of an example are read, unless more are asked for."""

_METRICS = {
    "causal-lm": ("perplexity",),
    "masked-lm": ("perplexity",),
    "sequence-classification": ("accuracy", "macro_f1"),
    "token-classification": ("accuracy",),
}
_SHOWN = {"perplexity": ".4g", "accuracy": ".1%", "macro_f1": ".3f"}


@dataclass(frozen=True)
class TaskMetric:
    """What three models make of the same examples.

    Attributes:
        base: the base model's figures by name, "loss" in nats a label among them; in torch in float64. None
            where it lacks weights that the adapter brings.
        trained: those of the base with the adapter beside its weights; in torch in float64.
        candidate: those of the candidate: a graph's in onnxruntime, a checkpoint's in torch in float64.
        labels: how many tokens or classes are predicted.
        bound: how far the candidate's loss may be from the trained model's; None for a quantised graph.
        data: of which examples, in words.
        check: whether it is no further.
    """

    base: Mapping[str, float] | None
    trained: Mapping[str, float]
    candidate: Mapping[str, float]
    labels: int
    bound: float | None
    data: str
    check: Check

    def __str__(self) -> str:
        models = {"base": self.base, "trained": self.trained, "candidate": self.candidate}
        lines = []
        for name in self.trained.keys() & _SHOWN.keys():
            shown = [
                f"{whose} {own[name]:{_SHOWN[name]}}" for whose, own in models.items() if own is not None
            ]
            lines.append(f"{name.replace('_', ' ')}: {', '.join(shown)}")
        return "; ".join(sorted(lines))

    def to_json(self) -> dict[str, Any]:
        """The figures by name, as JSON has them: no NaN, no infinity."""
        models = {"base": self.base, "trained": self.trained, "candidate": self.candidate}
        figures = {
            whose: None if own is None else {name: _json_number(value) for name, value in own.items()}
            for whose, own in models.items()
        }
        return {"data": self.data, "labels": self.labels, "bound": self.bound, **figures}


def measure_task(
    data: str | Path,
    candidate: Path,
    graph: ir.Graph | None,
    task: Task,
    model_dir: str | Path,
    adapter: Adapter | None,
    config: Mapping[str, Any],
    *,
    tokenizer_dir: str | Path | None = None,
    rows: int = DATA_ROWS,
    max_length: int = LENGTH,
    trusted: bool = False,
    rounded_to: np.dtype[Any] | None = None,
) -> TaskMetric:
    """Measure the base, the base with the adapter beside its weights, and the candidate.

    Args:
        data: JSON Lines in the form that `loracle finetune --data` reads for the task.
        candidate: the file of a graph, or a checkpoint's folder.
        graph: the graph's content; None for a checkpoint.
        task: what the model is for.
        model_dir: the base model's folder.
        config: the content of the merged model's `config.json`.
        tokenizer_dir: where the tokenizer is; None for `model_dir`.
        rows: how many examples are read, the first of the file.
        max_length: how many tokens of each.
        trusted: whether the folder's own modelling code may run.
        rounded_to: the dtype in which weights were merged that the candidate holds in a wider one.

    Raises:
        ConfigError: no data can be given for such a model, or no rows are asked for, or a checkpoint is of a
            model with code of its own.
        DataError: a line of the data is malformed, or has a class that the model has not.
        FileError: a file is missing, or the graph needs an input that is not understood.
    """
    if graph is None and config.get("auto_map"):
        raise ConfigError(
            f"{candidate}: expected a checkpoint that transformers knows by itself, got one with code of its "
            "own; leave the data out, or give an ONNX model"
        )
    read = labelled_rows(
        data, task, tokenizer_dir or model_dir, config, rows=rows, max_length=max_length, trusted=trusted
    )
    dtype = _stored_dtype(candidate, rounded_to) if graph is None else multiplied_dtype(graph, rounded_to)
    # One model after the other: each takes eight bytes a weight.
    tolerances: list[float] = []
    trained = _figures(
        read, _sampled(Float64Model(model_dir, adapter, task, config, trusted=trusted), dtype, tolerances)
    )
    base = None
    if _is_whole(model_dir, adapter):
        base = _figures(read, _exact(Float64Model(model_dir, None, task, trusted=trusted), dtype))
    if graph is None:
        # Its code, if there is some, stays where it is.
        found = _figures(read, _exact(Float64Model(candidate, None, task, config), dtype))
    else:
        found = _figures(read, _answered(candidate, task, config))
    labels = [len(read.kept(batch)[1]) for batch in read.batches]
    quantised = graph is not None and is_quantized(graph)
    bound = None if quantised else 2 * float(np.average(tolerances, weights=labels))
    shown = f"{sum(labels)} labels in {read.shown}"
    return TaskMetric(base, trained, found, sum(labels), bound, shown, _check(trained, found, bound, shown))


def _stored_dtype(folder: Path, rounded_to: np.dtype[Any] | None) -> np.dtype[Any]:
    """The dtype with most of a checkpoint's entries, or the coarser one in which they were rounded."""
    with Checkpoint(folder) as checkpoint:
        sizes: dict[np.dtype[Any], int] = {}
        for name in checkpoint.names:
            dtype = np.dtype(checkpoint.dtype(name))
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(checkpoint.shape(name))
    found = max(sizes, key=sizes.__getitem__)
    return found if rounded_to is None else coarser(found, rounded_to)


def _is_whole(model_dir: str | Path, adapter: Adapter | None) -> bool:
    """Whether the base has every weight of the model that the adapter makes of it."""
    with Checkpoint(model_dir) as checkpoint:
        merged = MergedWeights(checkpoint, adapter)
        held = frozenset(checkpoint.names)
        return all(name in held and merged.shape(name) == checkpoint.shape(name) for name in merged.names)


Logits = Callable[[Mapping[str, Array]], Array]
"""A batch's inputs, by the names of the model's forward, to its logits: (rows, n, classes), or
(rows, classes)."""


def _exact(model: Float64Model, dtype: np.dtype[Any]) -> Logits:
    def logits(feeds: Mapping[str, Array]) -> Array:
        (exact,) = next(model.draws(feeds, dtype, samples=0))
        found: Array = exact.numpy()
        return found

    return logits


def _sampled(model: Float64Model, dtype: np.dtype[Any], tolerances: list[float]) -> Logits:
    """The logits; the tolerance of each batch's is added to `tolerances`."""

    def logits(feeds: Mapping[str, Array]) -> Array:
        (truth,) = model.evaluate_feeds(feeds, dtype).values()
        tolerances.append(truth.tolerance)
        return truth.logits

    return logits


def _answered(path: Path, task: Task, config: Mapping[str, Any]) -> Logits:
    """The logits of a graph, which reads the rows one by one, without their padding."""
    session = open_foreign(path, task, config)
    decoder = ForeignDecoder(session) if task.cached else None

    def logits(feeds: Mapping[str, Array]) -> Array:
        rows = []
        for row, length in enumerate(feeds[ATTENTION_MASK].sum(1)):
            own = {name: array[row : row + 1, :length] for name, array in feeds.items()}
            found = (
                answer(session, task, own)[0] if decoder is None else decoder.logits(own[INPUT_IDS][0])[None]
            )
            if found.ndim == 3:
                found = np.pad(found, ((0, 0), (0, feeds[INPUT_IDS].shape[1] - length), (0, 0)))
            rows.append(found)
        return np.concatenate(rows)

    return logits


def _figures(read: LabelledRows, logits: Logits) -> dict[str, float]:
    def scores(model: nn.Module, batch: Batch) -> Scores:
        feeds = {name: tensor.numpy() for name, tensor in batch.items() if name != "labels"}
        found = torch.from_numpy(logits(feeds).astype(np.float64))
        kept, labels = read.kept(batch)
        return (found if kept.ndim == 1 else found[:, : kept.shape[1]][kept]), labels

    # The models are called by `logits`; a module is asked for to be put into evaluation mode.
    names = _METRICS[read.task.name]
    return score_metrics(scores, names, nn.Identity(), read.batches, torch.device("cpu"))


def _check(
    trained: Mapping[str, float], candidate: Mapping[str, float], bound: float | None, shown: str
) -> Check:
    loss, off = candidate["loss"], abs(candidate["loss"] - trained["loss"])
    figure = f"loss {loss:.6g}, trained {trained['loss']:.6g}"
    if bound is None:
        wrong = () if math.isfinite(loss) else (f"loss {loss}",)
        return Check("loss on the data is a finite number", not wrong, f"{figure}; {shown}", wrong)
    wrong = () if off <= bound else (f"loss {loss:.6g}: off by {off:.3g}, bound {bound:.3g}",)
    figure += f", off by {off:.2g} of {bound:.2g} allowed; {shown}"
    return Check("loss on the data is the trained model's", not wrong, figure, wrong)


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None
