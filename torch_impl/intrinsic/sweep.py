"""A sweep over d: the same model, data and budget in subspaces of growing dimension."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from loracle.files import output_folder
from loracle.files.atomic import check_output_folder
from loracle.files.run_folder import RunFolder
from loracle.reference import ConfigError, NonFiniteError

from ..data import Example
from ..distributed import joined
from ..encoded import EncodedData, EncodingSettings
from ..loading import check_model_source, native_bf16, quiet_transformers
from ..tasks import task_named
from ..trainer import Progress
from .baseline import majority_score
from .dimension import Point, Score, best_points, intrinsic_dimension
from .layers import number_layers
from .options import DIMS, IntrinsicOptions
from .projection import check_dense
from .results import IntrinsicResult, write_result
from .run import Encoded, Run, RunRecord, count_parameters
from .runner import KEPT, Prepared, Runner, load
from .splits import read_splits
from .subspace import check_dimension


def measure_intrinsic_dimension(
    options: IntrinsicOptions, progress: Progress | None = None
) -> IntrinsicResult:
    """Train the whole model and its random subspaces, and write what d is enough to ``options.out``.

    Every run starts from the model as it came, learns from the same examples in the same number of steps,
    with `loracle.torch_impl.finetune`'s loop, and is scored on the same held-out examples. Written, all or
    nothing: ``intrinsic.json`` and ``intrinsic.png``. The model's folder is only read.

    A run that has ended is kept in ``<out>.runs`` until all have; with ``options.resume`` a measurement that
    was interrupted goes on from there, also with other dims, learning rates and seeds.

    Args:
        options: see `IntrinsicOptions`.
        progress: called with (steps done, steps in all, last loss or None), over all runs.

    Raises:
        DataError: a line of the data is malformed, or a split can't be scored.
        FileError: the model or the data is missing, ``out`` is not empty, or a write failed.
        ConfigError: a dimension does not suit the model, ``resume`` finds a measurement with other options,
            or the whole model learns nothing.
        NonFiniteError: the whole model diverged at every learning rate.
    """
    with joined() as world:
        if world.size > 1:
            raise ConfigError(f"processes: expected one, got {world.size}; start without a launcher")
        fork = [world.device] if world.device.type == "cuda" else []
        with torch.random.fork_rng(devices=fork), quiet_transformers():
            return _measure(options, world.device, progress)


def _measure(options: IntrinsicOptions, device: torch.device, progress: Progress | None) -> IntrinsicResult:
    prepared = _prepare(options, device)
    digests = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in (("data_sha256", options.data), ("test_data_sha256", options.test_data))
        if path is not None
    }
    folder, success = RunFolder(options.out, KEPT), False
    identity = {**options.identity(), **digests, "bf16": prepared.bf16, "device": device.type}
    folder.open(identity, resume=options.resume)
    try:
        result = _result(options, prepared, Runner(options, prepared, folder.path, progress), digests)
        with output_folder(options.out) as made:
            write_result(made, result)
        success = True
    finally:
        folder.close(success=success)
    return result


def _prepare(options: IntrinsicOptions, device: torch.device) -> Prepared:
    """Read and check everything."""
    task = task_named(options.task)
    splits = read_splits(options, task)
    check_model_source(options.model)
    check_output_folder(options.out)
    loaded = load(options, task, splits, options.seeds[0])

    def encoded(examples: Sequence[Example], source: Path) -> EncodedData:
        length = loaded.longest(options.max_length)
        settings = EncodingSettings(length, str(source), loaded.labels, loaded.token_types)
        return task.encode(loaded.tokenizer, examples, settings)

    total = count_parameters(loaded.model)
    names = [name for name, _ in loaded.model.named_parameters()]
    layers = number_layers(names)[1] if options.projection == "said" else ()
    dims = options.dims
    if dims is None:
        dims = tuple(d for d in DIMS if len(layers) < d <= total)
    for d in dims:
        check_dimension(d, total, len(layers))
        if options.projection == "dense":
            check_dense(total, d)
    data = Encoded(
        encoded(splits.train, options.data),
        encoded(splits.validation, options.data),
        encoded(splits.test, options.test_data or options.data),
    )
    bf16 = native_bf16(device) if options.bf16 is None else options.bf16
    return Prepared(task, splits, data, dims, total, layers, device, bf16)


def _result(
    options: IntrinsicOptions, prepared: Prepared, runner: Runner, digests: dict[str, str]
) -> IntrinsicResult:
    seeds, metric = options.seeds, options.metric
    untrained = runner.records([Run("start", None, None, seed) for seed in seeds])
    start = best_points(_scores(untrained, metric))[0].score
    whole = runner.records([Run("full", None, lr, seed) for lr in options.full_lr for seed in seeds])
    full = _full(best_points(_scores(whole, metric)), whole, start, metric)
    parts = runner.records(
        [Run("subspace", d, lr, seed) for d in prepared.dims for lr in options.lr for seed in seeds]
    )
    points = best_points(_scores(parts, metric))
    records = [*untrained, *whole, *parts]
    names, data = prepared.splits.labels.names, prepared.data
    return IntrinsicResult(
        out=options.out,
        options=options.to_json(),
        data={
            **{name: len(getattr(data, name).examples) for name in ("train", "validation", "test")},
            "labels": list(names),
            **digests,
        },
        parameters=prepared.parameters,
        layers=prepared.layers,
        metric=metric,
        start=start,
        majority=majority_score(data.train, data.test, len(names), metric),
        full=full,
        points=points,
        dimension=intrinsic_dimension(points, full.score, start),
        diverged=tuple(d for d in prepared.dims if d not in {point.d for point in points}),
        seconds=sum(record.seconds for record in records),
        records=records,
    )


def _full(points: Sequence[Point], records: Sequence[RunRecord], start: float, metric: str) -> Point:
    """Return the whole model's point, which everything else is held against."""
    if not points:
        raise NonFiniteError(f"full_lr: expected a rate that trains, got: {records[-1].diverged}")
    (full,) = points
    if not full.score > start:
        raise ConfigError(
            f"full_lr: expected training of all parameters to raise {metric} above the untrained model's "
            f"{start:.3f}, got {full.score:.3f}; train longer, or give other rates"
        )
    return full


def _scores(records: Sequence[RunRecord], metric: str) -> Iterator[Score]:
    for one in records:
        validation = None if one.validation is None else one.validation[metric]
        test = None if one.test is None else one.test[metric]
        yield Score(one.run.d, one.run.lr or 0.0, one.run.seed, validation, test)
