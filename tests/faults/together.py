"""Two processes at once: one stops before each of its calls in turn, the other goes on as far as it can."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from .calls import Call
from .disk import Tree, read_tree, write_tree
from .readers import SUFFIXES
from .supervised import Child, Ended, run
from .sweeps import Found
from .writers import LEFT, PLACE, WRITERS, Act, add

Outcome = tuple[str, str, Tree]


class Pair:
    """Two things that are done to one folder."""

    def __init__(self, before: str, first: Act, second: Act, inputs: Path, scratch: Path) -> None:
        self.root = scratch / "root"
        self._before: Tree = {}
        self.restore()
        run(partial(WRITERS[before].before, inputs, self.root), str(self.root))
        self._before = read_tree(self.root)
        self._first, self._second = partial(first, inputs, self.root), partial(second, inputs, self.root)

    def restore(self) -> None:
        """Make the folder what it was before."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        write_tree(self._before, self.root)

    def in_turn(self, *, second_first: bool) -> tuple[Ended, Ended]:
        """Do one after the other."""
        self.restore()
        works = (self._second, self._first) if second_first else (self._first, self._second)
        ended = [run(work, str(self.root)) for work in works]
        return (ended[1], ended[0]) if second_first else (ended[0], ended[1])

    def alone(self, *, reads: bool = False) -> Ended:
        """Do the first alone."""
        self.restore()
        first = Child(self._first, str(self.root), reads=reads)
        _finish(first)
        return first.end()

    def at_once(self, at: int, *, reads: bool = False) -> tuple[Ended, Ended]:
        """Stop the first before a call, and do the second, which may wait for a lock of the first."""
        self.restore()
        first = Child(self._first, str(self.root), reads=reads)
        for _ in range(at):
            if first.next() is not None:
                first.let()
        first.next()
        second = Child(self._second, str(self.root))
        _finish(second, may_wait=True)
        first.let()
        _finish(first)
        _finish(second)
        return first.end(), second.end()


def two_writers(name: str, inputs: Path, scratch: Path, *, every: bool) -> Found:
    """Let the writers of `PAIRS` run at once: it ends as if one had run after the other, in either order.

    Args:
        every: stop at every call of the first; else at those that change names alone.
    """
    before, first, second, one_only = PAIRS[name]
    pair, found = Pair(before, first, second, inputs, scratch), Found()
    allowed: list[Outcome] = []
    for second_first in (False, True):
        ended = pair.in_turn(second_first=second_first)
        allowed.append((ended[0].how, ended[1].how, read_tree(pair.root)))
    alone = pair.alone()
    if one_only:
        allowed.append((alone.how, "refused", read_tree(pair.root)))
    found.counts["calls"] = len(alone.calls)
    for at in _stops(alone.calls, every=every):
        ended = pair.at_once(at)
        got = ended[0].how, ended[1].how, read_tree(pair.root)
        found.counts[f"{got[0]}, {got[1]}"] += 1
        if got not in allowed:
            names = [held for held in got[2] if LEFT.search(held)] or sorted(got[2])
            call = alone.calls[at]
            found.wrong.append(
                f"{name}: stopped at {at}, {call.name} of {Path(call.path).name}: {got[0]}, {got[1]}: "
                f"{ended[0].message} {ended[1].message}; there is {names}"
            )
    return found


def reader_and_writer(form: str, inputs: Path, scratch: Path, *, every: bool) -> Found:
    """Stop a reader before it opens each file of a deployment, and let a task be exchanged meanwhile.

    The answer must be that of the old task or that of the new, or an error of loracle's.
    """
    writer = partial(add, form=form, name="french", replace=True)
    pair, found = Pair(f"exchanged task, {form}", answer, writer, inputs, scratch), Found()
    old = pair.alone(reads=True)
    calls = [call for call in old.calls if call.kind == "read"]
    pair.in_turn(second_first=True)
    new = run(partial(answer, inputs, pair.root), str(pair.root))
    if old.message == new.message or (old.how, new.how) != ("done", "done"):
        raise RuntimeError(f"{old.how}, {new.how}: {old.message}, {new.message}")
    found.counts["opens"] = len(calls)
    for at in range(0, len(old.calls), 1 if every else 3):
        reader, ended = pair.at_once(at, reads=True)
        answers = {old.message: "the old answer", new.message: "the new answer"}
        said = answers.get(reader.message, "another answer") if reader.how == "done" else reader.how
        found.counts[said] += 1
        if ended.how != "done" or said not in ("the old answer", "the new answer", "refused"):
            found.wrong.append(f"{form}: at {at}, {old.calls[at].path}: {said}: {reader.message}")
    return found


def answer(inputs: Path, root: Path) -> str:
    """A digest of the logits of the task `french`."""
    from loracle.export import Deployment, open_decoder
    from loracle.export.task_names import find_task

    form, path = find_task(root / PLACE, "french")
    session = open_decoder(path, 8) if form == "linked" else Deployment(root / PLACE).decoder("french", 8)
    return hashlib.sha256(session.prefill([[5, 6, 7]]).tobytes()).hexdigest()


def _stops(calls: Iterable[Call], *, every: bool) -> list[int]:
    changing = ("rename", "unlink", "mkdir", "rmdir")
    return [at for at, call in enumerate(calls) if every or call.kind in changing]


def _finish(child: Child, *, may_wait: bool = False) -> None:
    while child.next(may_wait=may_wait) is not None:
        child.let()


def _of_file(inputs: Path, root: Path) -> None:
    from loracle.files import write_atomic

    write_atomic(root / "file", b"the other new one" * 50)


def _other_adapter(inputs: Path, root: Path) -> None:
    from loracle.files import read_adapter, write_adapter

    write_adapter(root / "out", read_adapter(inputs / "mlp"))


def _other_export(inputs: Path, root: Path) -> None:
    from loracle.export import export

    export(inputs / "base", root / "out", inputs / "mlp")


def _pairs() -> Iterable[tuple[str, tuple[str, Act, Act, bool]]]:
    def work(name: str) -> Act:
        return WRITERS[name].work

    yield "file", ("file", work("file"), _of_file, False)
    yield "adapter", ("adapter", work("adapter"), _other_adapter, False)
    yield "export", ("export", work("export"), _other_export, False)
    yield "merge", ("merge", work("merge"), work("merge"), False)
    yield "cache", ("cache", work("cache"), work("cache"), False)
    yield "in place", ("in place, linked", work("in place, linked"), work("in place, linked"), False)
    checkpoints = work("later checkpoints")
    yield "checkpoints", ("later checkpoints", checkpoints, checkpoints, True)
    for form in SUFFIXES:
        exchanged = work(f"exchanged task, {form}")
        other: Callable[..., object] = partial(add, form=form, adapter="wide")
        against: Mapping[str, tuple[str, Act]] = {
            "exchanged": ("exchanged task", partial(other, name="french", replace=True)),
            "removed": ("removed task", work(f"removed task, {form}")),
            "renamed": ("renamed task", work(f"renamed task, {form}")),
        }
        for how, (before, second) in against.items():
            yield f"exchanged and {how}, {form}", (f"{before}, {form}", exchanged, second, False)
        yield f"new twice, {form}", (f"new task, {form}", work(f"new task, {form}"), other, False)


PAIRS: Mapping[str, tuple[str, Act, Act, bool]] = dict(_pairs())
"""The writer that makes what is there before, two that write at once, and whether the second may be refused
for the first is under way."""
