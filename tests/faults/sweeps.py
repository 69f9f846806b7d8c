"""A writer, with a fault at each of its calls or with the power gone, and what is there afterwards."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from .calls import Call
from .disk import Disk, Flush, Step, Tree, read_tree, write_tree
from .outages import Outages
from .supervised import FAULTS, Ended, Fault, run
from .writers import LEFT, WRITERS, Act


@dataclass
class Found:
    """What a sweep found: how many of what, and what is wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Bench:
    """A writer, the calls that it makes when nothing goes wrong, and the trees before, between and after."""

    def __init__(self, name: str, inputs: Path, scratch: Path) -> None:
        self.writer = WRITERS[name]
        self._inputs, self.root = inputs, scratch / "root"
        self._next: dict[frozenset[tuple[str, bytes]], list[str]] = {}
        self.old: Tree = {}
        self.restore({})
        self.do(self.writer.before)
        self.old = read_tree(self.root)
        made = []
        for step in self.writer.between:
            self.restore(self.old)
            self.do(step)
            made.append(read_tree(self.root))
        self.between = tuple(made)
        self.restore(self.old)
        ended = self.do(self.writer.work)
        self.calls, self.new = ended.calls, read_tree(self.root)

    def restore(self, tree: Tree) -> None:
        """Make the folder hold a tree."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        write_tree(tree, self.root)

    def do(self, step: Act) -> Ended:
        """Do something without a fault. Raises RuntimeError where it fails."""
        ended = self.run(step)
        if ended.how != "done":
            raise RuntimeError(f"{self.writer.name}: {ended.how}: {ended.message}")
        return ended

    def run(self, step: Act, fault: Fault | None = None) -> Ended:
        """Do something, with one fault or none, in a process of its own."""
        return run(partial(step, self._inputs, self.root), str(self.root), fault)

    def judge(self, tree: Tree) -> str | None:
        """See `Writer.judge`."""
        return self.writer.judge(tree, self.old, self.new, self.between)

    def next_run(self, tree: Tree, state: str) -> list[str]:
        """What is wrong after the next run, which finds `tree` in the folder."""
        key = frozenset((LEFT.sub("/left/", name), data) for name, data in tree.items())
        if key not in self._next:
            self._next[key] = list(self._after_next(tree, state))
        return self._next[key]

    def _after_next(self, tree: Tree, state: str) -> Iterable[str]:
        step = self.writer.again if state == "new" else self.writer.work
        if step is not None:
            self.restore(tree)
            ended = self.run(step)
            if ended.how != "done":
                yield f"the next run is {ended.how}: {ended.message}"
                return
            tree = read_tree(self.root)
        seen = self.writer.seen
        if seen(tree, self.old, self.new) != seen(self.new, self.old, self.new):
            yield "the next run does not make the new one"
        yield from (f"the next run leaves {name}" for name in sorted(tree.keys() - self.new.keys()))


def all_faults(calls: Sequence[Call], kinds: Sequence[str]) -> list[Fault]:
    """Every kind of fault at every call; of a write alone that it is short."""
    return [
        Fault(kind, at)
        for at, call in enumerate(calls)
        for kind in kinds
        if kind != "short" or call.kind == "write"
    ]


def some_faults(calls: Sequence[Call], turn: int) -> list[Fault]:
    """A fault for each kind of call, each time another one: at the first call of the kind or at the last."""
    first = {call.kind: at for at, call in reversed(list(enumerate(calls)))}
    last = {call.kind: at for at, call in enumerate(calls)}
    faults = []
    for number, kind in enumerate(first, turn):
        fault = FAULTS[number % len(FAULTS)]
        at = (first, last)[number // len(FAULTS) % 2][kind]
        faults.append(Fault("ENOSPC" if fault == "short" and kind != "write" else fault, at))
    return faults


def short_sweep(name: str, inputs: Path, scratch: Path) -> Found:
    """Some faults of the writer `name`, and what an outage of power may leave after each of its calls."""
    bench = Bench(name, inputs, scratch)
    found = _outages(bench)
    turn = 3 * list(WRITERS).index(name)  # so that every kind of call meets every fault
    _faults(bench, some_faults(bench.calls, turn), found)
    return found


def outages(name: str, inputs: Path, scratch: Path) -> Found:
    """What an outage of power may leave after each call of the writer `name`."""
    return _outages(Bench(name, inputs, scratch))


def long_sweep(name: str, inputs: Path, scratch: Path, kinds: Sequence[str] = FAULTS) -> Found:
    """Every kind of fault at every call of the writer `name`."""
    bench, found = Bench(name, inputs, scratch), Found()
    _faults(bench, all_faults(bench.calls, kinds), found)
    return found


def needless_flushes(name: str, inputs: Path, scratch: Path) -> Found:
    """Leave out each flush of the writer `name`: it is needed where the power can do harm then."""
    bench, found = Bench(name, inputs, scratch), Found()
    disk = Disk.replay(str(bench.root), bench.old, bench.calls)
    flushed = [call.path for call in bench.calls if call.kind == "flush"]
    flushes = [step for step in disk.steps if isinstance(step, Flush)]
    for flush, path in zip(flushes, flushed, strict=True):
        needed = next(iter(_broken(bench, disk, Counter(), without=flush)), None) is not None
        found.counts["needed" if needed else "needless"] += 1
        if not needed:
            found.wrong.append(LEFT.sub("/left/", path.removeprefix(str(bench.root))))
    return found


def _faults(bench: Bench, faults: Iterable[Fault], found: Found) -> None:
    """Do the work with one fault at a time."""
    found.counts["calls"] = len(bench.calls)
    for fault in faults:
        bench.restore(bench.old)
        ended = bench.run(bench.writer.work, fault)
        tree = read_tree(bench.root)
        state = bench.judge(tree)
        found.counts[fault.kind] += 1
        found.counts[f"{fault.kind}: {ended.how}, {state}"] += 1
        wrong = list(_wrong(bench, fault, ended, tree, state))
        if state is not None:
            wrong += bench.next_run(tree, state)
        call = bench.calls[fault.at]
        at = f"{bench.writer.name}: {fault.kind} at {fault.at}, {call.name} of {Path(call.path).name}"
        found.wrong += [f"{at}: {one}; {ended.how}: {ended.message}" for one in wrong]


def _wrong(bench: Bench, fault: Fault, ended: Ended, tree: Tree, state: str | None) -> Iterable[str]:
    """What is wrong right after a fault."""
    if state is None:
        yield "neither the old one nor the new one is there"
    expected = {"kill": {"killed"}, "interrupt": {"interrupted", "done"}}
    if ended.how not in expected.get(fault.kind, {"refused", "done"}):
        yield f"it ends as {ended.how}"
    if ended.how == "done" and state != "new":
        yield f"it is done, and what is there is {state}"
    if ended.how == "refused":
        if state == "new":
            yield "it is refused, and the new one is there"
        if "\n" in ended.message or ended.code != 2:
            yield f"it ends with {ended.code} and more than a line"
    for call in ended.elsewhere:
        if "torchinductor" not in call.path:  # which torch makes when it is imported
            yield f"it writes elsewhere: {call.name} of {call.path}"
    stuck = fault.kind in ("kill", "interrupt", "EROFS") or bench.calls[fault.at].kind in ("unlink", "rmdir")
    if not stuck and any(map(LEFT.search, tree)):
        yield "something is left over"


def _outages(bench: Bench) -> Found:
    """Let the power go after each call, and look at all that may be on the disk."""
    found = Found()
    disk = Disk.replay(str(bench.root), bench.old, bench.calls)
    if disk.after(disk.steps) != bench.new:
        found.wrong.append(
            f"{bench.writer.name}: calls were missed: replayed, they do not make what is there"
        )
    found.counts["calls"] = len(bench.calls)
    found.wrong += [f"{bench.writer.name}: {one}" for one in _broken(bench, disk, found.counts)]
    return found


def _broken(bench: Bench, disk: Disk, counts: Counter[str], without: Step | None = None) -> Iterable[str]:
    for count, tree in Outages(disk).states(without):
        state = bench.judge(tree)
        counts[f"outages: {state}"] += 1
        if state is None:
            yield f"after {count} steps of {len(disk.steps)} neither the old nor the new may be there"
        elif count == len(disk.steps) and state != "new" and bench.writer.lasts:
            yield f"it has ended, and what is there may be the {state}"
