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
from .supervised import ERRORS, FAULTS, Ended, Fault, run
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


def all_faults(calls: Sequence[Call]) -> list[Fault]:
    """Every fault at every call; of a write alone that it is short."""
    return [
        Fault(kind, at)
        for at, call in enumerate(calls)
        for kind in FAULTS
        if kind != "short" or call.kind == "write"
    ]


def some_faults(calls: Sequence[Call]) -> list[Fault]:
    """Each kind of call with an error, in turn another one; the last of each, which commits or cleans up,
    killed or interrupted; the longest write short."""
    first = {call.kind: at for at, call in reversed(list(enumerate(calls)))}
    last = {call.kind: at for at, call in enumerate(calls)}
    faults = [Fault(ERRORS[turn % len(ERRORS)], at) for turn, at in enumerate(first.values())]
    faults += [Fault(("kill", "interrupt")[turn % 2], at) for turn, at in enumerate(last.values())]
    longest = max(range(len(calls)), key=lambda at: len(calls[at].data))
    return faults + [Fault("short", longest)] * (calls[longest].kind == "write")


def sweep(name: str, inputs: Path, scratch: Path, *, every: bool) -> Found:
    """Do the work of the writer `name` with one fault at a time."""
    bench, found = Bench(name, inputs, scratch), Found()
    found.counts["calls"] = len(bench.calls)
    for fault in all_faults(bench.calls) if every else some_faults(bench.calls):
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
        at = f"{name}: {fault.kind} at {fault.at}, {call.name} of {Path(call.path).name}"
        found.wrong += [f"{at}: {one}; {ended.how}: {ended.message}" for one in wrong]
    return found


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
    if ended.elsewhere:
        yield f"it writes elsewhere: {ended.elsewhere[0].name} of {ended.elsewhere[0].path}"
    stuck = fault.kind in ("kill", "interrupt", "EROFS") or bench.calls[fault.at].kind in ("unlink", "rmdir")
    if not stuck and any(map(LEFT.search, tree)):
        yield "something is left over"


def outages(name: str, inputs: Path, scratch: Path) -> Found:
    """Let the power go after each call of the writer `name`, and look at all that may be on the disk."""
    bench, found = Bench(name, inputs, scratch), Found()
    disk = Disk.replay(str(bench.root), bench.old, bench.calls)
    if disk.after(disk.steps) != bench.new:
        found.wrong.append(f"{name}: calls were missed: replayed, they do not make what is there")
    found.counts["calls"] = len(bench.calls)
    found.wrong += [f"{name}: {one}" for one in _broken(bench, disk, found.counts)]
    return found


def needless_flushes(name: str, inputs: Path, scratch: Path) -> Found:
    """Leave out each flush of the writer `name`: "needed" where the power can then do harm."""
    bench, found = Bench(name, inputs, scratch), Found()
    disk = Disk.replay(str(bench.root), bench.old, bench.calls)
    flushed = [call.path for call in bench.calls if call.kind == "flush"]
    flushes = [step for step in disk.steps if isinstance(step, Flush)]
    for flush, path in zip(flushes, flushed, strict=True):
        needed = next(iter(_broken(bench, disk, Counter(), without=flush)), None) is not None
        found.counts["needed" if needed else "needless"] += 1
        if not needed:
            found.wrong.append(f"{name}: the flush of {LEFT.sub('/left/', path)} is not needed")
    return found


def _broken(bench: Bench, disk: Disk, counts: Counter[str], without: Step | None = None) -> Iterable[str]:
    for count, tree in Outages(disk).states(without):
        state = bench.judge(tree)
        counts[f"outages: {state}"] += 1
        if state is None:
            yield f"after {count} steps of {len(disk.steps)} neither the old nor the new may be there"
        elif count == len(disk.steps) and state != "new" and bench.writer.lasts:
            yield f"it has ended, and what is there may be the {state}"
