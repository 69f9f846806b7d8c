"""Every writer, small: what is there before, what it does, and what a reader makes of what it leaves."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from . import readers
from .disk import Tree
from .readers import SUFFIXES

Act = Callable[[Path, Path], object]
"""Something done with the inputs and the folder that is written to."""
Seen = Callable[[Tree, Tree, Tree], Tree]

LEFT = re.compile(r"(?:^|/)\.[^/]{1,32}\.[0-9a-f]{16}\.partial(?:/|$)")
"""Names of what a killed process leaves, and the next removes."""
PLACE = "deployment"


def _nothing(inputs: Path, root: Path) -> None:
    pass


@dataclass(frozen=True)
class Writer:
    """A writer and its oracle.

    Attributes:
        work: what is killed and fails.
        before: makes what is there before.
        seen: of a tree, with the old and the new one, what its reader goes by.
        between: make, from the old, the states that the writer may stop at on its way.
        again: what removes all leftovers once the new is in place; None where there are none.
        lasts: whether the new is on the disk when the writer has ended.
    """

    name: str
    work: Act
    before: Act = _nothing
    seen: Seen = readers.itself
    between: tuple[Act, ...] = ()
    again: Act | None = None
    lasts: bool = True

    def judge(self, tree: Tree, old: Tree, new: Tree, between: tuple[Tree, ...]) -> str | None:
        """Whether a tree is the "old", the "new", or "between" them; None where it is none of these."""
        seen = self.seen({name: data for name, data in tree.items() if not LEFT.search(name)}, old, new)
        if seen == self.seen(new, old, new):
            return "new"
        if seen == self.seen(old, old, new):
            return "old"
        return "between" if any(seen == self.seen(one, old, new) for one in between) else None


def _merge(inputs: Path, root: Path) -> None:
    from loracle.files.merged_checkpoint import write_merged_checkpoint

    write_merged_checkpoint(
        inputs / "sharded", inputs / "attention", root / "out", dtype="float16", threads=1
    )


def _adapter(inputs: Path, root: Path) -> None:
    from loracle.files import read_adapter, write_adapter

    write_adapter(root / "out", read_adapter(inputs / "attention"))


def _baked(inputs: Path, root: Path) -> None:
    from loracle.export import export

    export(inputs / "base", root / "out", inputs / "attention")


def _empty_folder(inputs: Path, root: Path) -> None:
    (root / "out").mkdir()


def _first_task(inputs: Path, root: Path, form: str, *, replace: bool = False) -> None:
    from loracle.export import export

    model, adapter = inputs / "base", inputs / "attention"
    export(model, root / "out", adapter, form=form, name="french", replace=replace)


def add(
    inputs: Path, root: Path, form: str, name: str = "dutch", adapter: str = "mlp", *, replace: bool = False
) -> None:
    """Add a task to the deployment."""
    from loracle.export.task_changes import add_task

    model, source = inputs / "base", inputs / adapter
    add_task(root / PLACE, name, model, source, form=form, replace=replace)


def deployment(inputs: Path, root: Path, form: str) -> None:
    """A deployment with the tasks `french` and `german`, both verified."""
    shutil.copytree(inputs / form, root / PLACE)


def _one_task(inputs: Path, root: Path, form: str) -> None:
    """A deployment with `french` alone, verified, so that a task with another adapter needs more inputs."""
    shutil.copytree(inputs / f"{form}, one", root / PLACE)


def _remove(inputs: Path, root: Path, name: str) -> None:
    from loracle.export.task_changes import remove_task

    remove_task(root / PLACE, name)


def _rename(inputs: Path, root: Path, name: str = "french", new: str = "dutch") -> None:
    from loracle.export.task_changes import rename_task

    rename_task(root / PLACE, name, new)


def _renamed_twice(inputs: Path, root: Path) -> None:
    _rename(inputs, root, "dutch", "polish")
    _rename(inputs, root, "polish", "dutch")


def _added_and_removed(inputs: Path, root: Path, form: str) -> None:
    add(inputs, root, form, "polish")
    _remove(inputs, root, "polish")


def _model(inputs: Path, root: Path) -> None:
    shutil.copytree(inputs / "mixed", root / "model")


def _in_place(inputs: Path, root: Path, form: str, *, replace: bool = False) -> None:
    from loracle.export import export

    model = root / "model"
    export(model, model, inputs / "attention", form=form, name="french", in_place=True, replace=replace)


def _base_in_place(inputs: Path, root: Path, form: str) -> None:
    from loracle.export.task_changes import remove_task

    _in_place(inputs, root, form)
    remove_task(root / "model", "french")


def _record(inputs: Path, root: Path) -> None:
    from loracle.export.deployed_tasks import deployed_task
    from loracle.export.verified import Verified, write_verified

    document = deployed_task(root / PLACE, "french").document
    assert document is not None
    check = {"name": "all is well", "figure": "2 checks"}
    verified = Verified(document.sha256, "2027-01-02T03:04:05+00:00", (check,), 0.5, 1.0, {"loracle": "1"})
    write_verified(root / PLACE, "french", verified)


def _cache(inputs: Path, root: Path) -> None:
    from loracle.export.architecture import check_supported
    from loracle.export.graphs import graph_template
    from loracle.export.options import GraphOptions
    from loracle.export.template import cached
    from loracle.files import Checkpoint

    options = GraphOptions(packed=False)
    with Checkpoint(inputs / "base") as checkpoint:
        task = check_supported(checkpoint.config, "config.json")

        def make() -> Mapping[str, Any]:
            return {"model.onnx": graph_template(checkpoint, checkpoint.config, task, options)}

        cached(checkpoint.config, options, ("model.onnx",), make, root / "cache")


def _old_file(inputs: Path, root: Path) -> None:
    (root / "file").write_bytes(b"old" * 100)


def _file(inputs: Path, root: Path) -> None:
    from loracle.files import write_atomic

    write_atomic(root / "file", b"the new one" * 100)


def _certificate(inputs: Path, root: Path, *, page: bool) -> None:
    from certificate_fixtures import harmful

    from loracle.export.verification.certificate import write_certificate
    from loracle.export.verification.certificate_page import write_page

    certificate = replace(harmful("the new one"), time="2027-01-02T03:04:05+00:00")
    (write_page if page else write_certificate)(root / "file", certificate)


def _checkpoints(inputs: Path, root: Path, steps: tuple[int, ...] = ()) -> None:
    from test_torch_checkpoints import RUN, state

    from loracle.torch_impl.checkpoints import Checkpoints

    checkpoints = Checkpoints(root / "out")
    found = checkpoints.open(RUN, resume=True)
    try:
        for step in steps:
            if found is None or found.curve.done < step:
                checkpoints.save(state(step, best=step / 2))
    finally:
        checkpoints.close(success=False)


def _finetune(inputs: Path, root: Path) -> None:
    import torch

    from loracle.torch_impl import FinetuneOptions, finetune

    torch.set_num_threads(1)
    settings: dict[str, Any] = {"rank": 2, "bf16": False, "lr": 0.05, "dropout": 0.2, "batch_size": 2}
    settings |= {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "early_stopping_patience": 5}
    settings |= {"data": inputs / "pairs.jsonl", "eval_data": inputs / "pairs.jsonl", "resume": True}
    finetune(FinetuneOptions(model=str(inputs / "llama"), out=root / "out", **settings))


def _finetune_anew(inputs: Path, root: Path) -> None:
    shutil.rmtree(root / "out")
    _finetune(inputs, root)


def _of_tasks(form: str) -> tuple[Writer, ...]:
    def seen(task: str, *, goes: bool = False) -> Seen:
        graph = f"{PLACE}/{'model' if form == 'adapter-inputs' else 'swappable'}.onnx"
        file = f"{PLACE}/{task}{SUFFIXES[form]}"
        of_task = partial(readers.with_graph, graph=graph, task=file, goes=goes)
        return readers.linked if form == "linked" else of_task

    whole, one = partial(deployment, form=form), partial(_one_task, form=form)
    exchanged = partial(add, form=form, name="french", replace=True)
    new, again = partial(add, form=form), partial(add, form=form, replace=True)
    tidying = partial(_added_and_removed, form=form)
    first = partial(_first_task, form=form)
    return (
        Writer(f"first task, {form}", first, again=partial(first, replace=True)),
        Writer(f"new task, {form}", new, one, seen("dutch"), again=again),
        Writer(f"exchanged task, {form}", exchanged, one, seen("french"), again=exchanged),
        Writer(
            f"removed task, {form}",
            partial(_remove, name="french"),
            whole,
            seen("french", goes=True),
            again=tidying,
        ),
        Writer(f"renamed task, {form}", _rename, whole, seen("dutch"), again=_renamed_twice),
    )


def _in_place_writer(form: str) -> Writer:
    work = partial(_in_place, form=form)
    seen, between = partial(readers.in_place, form=form), (partial(_base_in_place, form=form),)
    return Writer(f"in place, {form}", work, _model, seen, between, partial(work, replace=True))


_ALL = (
    Writer("file", _file, _old_file, again=_file),
    Writer("certificate", partial(_certificate, page=False), _old_file),
    Writer("page of a certificate", partial(_certificate, page=True), _old_file),
    Writer("adapter", _adapter),
    Writer("merge", _merge, _empty_folder),
    Writer("export", _baked),
    *(writer for form in SUFFIXES for writer in _of_tasks(form)),
    *map(_in_place_writer, ("linked", "swappable")),
    Writer("record", _record, partial(deployment, form="linked"), again=_record),
    Writer("cache", _cache, seen=readers.files, again=_cache, lasts=False),
    Writer("first checkpoint", partial(_checkpoints, steps=(3,)), seen=readers.latest, again=_checkpoints),
    Writer(
        "later checkpoints",
        partial(_checkpoints, steps=(6, 9)),
        partial(_checkpoints, steps=(3,)),
        readers.latest,
        (partial(_checkpoints, steps=(6,)),),
        _checkpoints,
    ),
    Writer("fine-tuning", _finetune, seen=readers.trained, again=_finetune_anew),
)
WRITERS: Mapping[str, Writer] = {writer.name: writer for writer in _ALL}
"""All of them, by name."""
