"""A sweep over ranks and target sets: the same model, data, seeds and budget in every cell."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from loracle.files import output_folder
from loracle.files.atomic import check_output_folder
from loracle.files.partial import partial_folder
from loracle.files.run_folder import Kept, RunFolder, read_record, write_record
from loracle.reference import ConfigError, NonFiniteError

from ..distributed import joined
from ..labels import collect_labels
from ..loading import check_model_source, load_model, native_bf16, quiet_transformers
from ..tasks import task_named
from ..trainer import Progress
from .cell import Cell, CellRecord, make_cell
from .held_out import Divided, files_in, read_divided
from .options import RankSweepOptions
from .results import RankSweepResult, write_result
from .sizes import TargetSet, measure_set, ranks_of
from .table import best_of, enough, entry_of, untrained

KEPT = Kept("cells", r"cell-[0-9a-f]{16}\.json", "sweep")
"""What is beside the output for as long as a sweep lasts."""


@dataclass(frozen=True)
class _Prepared:
    divided: Divided
    sets: tuple[TargetSet, ...]
    ranks: Mapping[tuple[str, int], int]
    device: torch.device
    bf16: bool


def sweep_ranks(options: RankSweepOptions, progress: Progress | None = None) -> RankSweepResult:
    """Train an adapter for each rank, target set and seed, and write which is enough to ``options.out``.

    Every cell is a run of `loracle.torch_impl.finetune` from the model as it came, on the same examples in
    the same number of steps, and is measured on the same held-out examples. Written, all or nothing:
    ``rank.json`` and ``rank.png``. The model's folder is only read; no adapter is kept.

    A cell that has ended is kept in ``<out>.cells`` until all have; with ``options.resume`` a sweep that was
    interrupted goes on from there, also with other ranks, targets and seeds.

    Args:
        options: see `RankSweepOptions`.
        progress: called with (steps done, steps in all, last loss or None), over all cells.

    Raises:
        DataError: a line of the data is malformed, or there is nothing to measure on.
        FileError: the model or the data is missing, ``out`` is not empty, or a write failed.
        TargetError: a target set has no layer in the model.
        ConfigError: a rank is above a dimension, or ``resume`` finds a sweep with other options.
        NonFiniteError: training diverged in every cell.
    """
    prepared = _prepare(options)
    folder, success = RunFolder(options.out, KEPT), False
    own = {"bf16": prepared.bf16, "device": prepared.device.type}
    folder.open({**options.identity(), **prepared.divided.digests, **own}, resume=options.resume)
    try:
        result = _result(options, prepared, _records(options, prepared, folder.path, progress))
        with output_folder(options.out) as made:
            write_result(made, result)
        success = True
    finally:
        folder.close(success=success)
    return result


def _prepare(options: RankSweepOptions) -> _Prepared:
    """Read and check everything."""
    task = task_named(options.task)
    divided = read_divided(options, task)
    check_model_source(options.model)
    check_output_folder(options.out)
    with joined() as world:
        if world.size > 1:
            raise ConfigError(f"processes: expected one, got {world.size}; start without a launcher")
        device = world.device
    bf16 = native_bf16(device) if options.bf16 is None else options.bf16
    labels = collect_labels(divided.examples, str(options.data)) if task.classes else None
    with quiet_transformers():
        model = load_model(options.model, bf16=bf16, task=task, labels=labels, seed=options.seeds[0]).model
        sets = tuple(measure_set(model, name) for name in options.targets)
    ranks = ranks_of(sets, options.ranks, options.constant_parameters)
    return _Prepared(divided, sets, ranks, device, bf16)


def _records(
    options: RankSweepOptions, prepared: _Prepared, folder: Path, progress: Progress | None
) -> dict[Cell, CellRecord]:
    """Return the record of each cell, in order; those that are there already are read."""
    by_name = {one.name: one for one in prepared.sets}
    cells = list(
        dict.fromkeys(
            Cell(name, r, seed) for (name, _), r in prepared.ranks.items() for seed in options.seeds
        )
    )
    found = {}
    for index, cell in enumerate(cells):
        path = folder / f"cell-{cell.name}.json"
        if path.exists():
            found[cell] = read_record(path, "a cell", CellRecord.from_json)
            continue

        def told(step: int, steps: int, loss: float | None, index: int = index) -> None:
            if progress is not None:
                progress(index * steps + step, len(cells) * steps, loss)

        with partial_folder(path) as scratch:
            files = files_in(scratch, prepared.divided)
            record = make_cell(cell, options, by_name[cell.targets], files, scratch, told)
        write_record(path, record.to_json())
        found[cell] = record
    return found


def _result(
    options: RankSweepOptions, prepared: _Prepared, records: Mapping[Cell, CellRecord]
) -> RankSweepResult:
    metric, lower = options.shown_metric, options.lower_is_better
    table = tuple(
        entry_of(name, rank, [records[Cell(name, r, seed)] for seed in options.seeds], metric)
        for (name, rank), r in prepared.ranks.items()
    )
    best, before = best_of(table, lower), untrained(records.values(), metric)
    if best is None or before is None:
        why = next(iter(records.values())).diverged
        raise NonFiniteError(f"lr: expected a rate that trains, got {options.lr!r}, with which: {why}")
    divided = prepared.divided
    return RankSweepResult(
        out=options.out,
        options=options.to_json(),
        data={"train": divided.train_rows, "held_out": divided.held_out_rows, **divided.digests},
        device=prepared.device.type,
        bf16=prepared.bf16,
        metric=metric,
        lower_is_better=lower,
        sets=prepared.sets,
        before=before,
        table=table,
        best=best,
        enough=enough(table, before, options.share, lower),
        seconds=sum(record.seconds for record in records.values()),
        records=list(records.values()),
    )
