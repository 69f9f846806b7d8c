"""What a disk may hold after the power has gone: of what was not flushed, anything.

A file's bytes are on the disk once the file was flushed after them; a name, of a file or folder, once the
folder was flushed that it is in. Until then each is there or not, whatever came before or after: file systems
write them in an order of their own. A rename is one step. Of a file's bytes that were not flushed there are
none, half, or zeros in their place. This is what POSIX allows, and more than journaling file systems do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from .disk import Content, Disk, Flush, Names, Step, Tree

_ALL_SUBSETS = 5


class Outages:
    """What may be on a disk when the power goes."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._parts: dict[tuple[int, str], Content] = {}

    def states(self, without: Step | None = None) -> Iterator[tuple[int, Tree]]:
        """How many steps were made, and what may be on the disk when the power goes then.

        Args:
            without: a step, a flush, that is taken to be left out.
        """
        seen: set[tuple[tuple[int, ...], bool]] = set()
        steps = self._disk.steps
        counts = range(len(steps) + 1)
        # Without a flush it is the last steps that do harm.
        for count in counts if without is None else reversed(counts):
            done = [step for step in steps[:count] if step is not without]
            sure = _flushed(done)
            open_names = [at for at, step in enumerate(done) if isinstance(step, Names) and not sure[at]]
            open_files = sorted(
                {step.file for at, step in enumerate(done) if isinstance(step, Content) and not sure[at]}
            )
            for lost in _lost(open_names):
                for how in _ways(open_files, few=bool(lost)):
                    kept = list(self._kept(done, sure, lost, how))
                    key = tuple(map(id, kept)), count == len(steps)
                    if key not in seen:
                        seen.add(key)
                        yield count, self._disk.after(kept)

    def _kept(
        self, steps: Sequence[Step], sure: Sequence[bool], lost: frozenset[int], how: Mapping[int, str]
    ) -> Iterator[Step]:
        """The steps that are on the disk, or what there is of them."""
        for at, step in enumerate(steps):
            if isinstance(step, Content) and not sure[at] and step.file in how:
                if how[step.file] != "none":
                    yield self._part(step, how[step.file])
            elif at not in lost and not isinstance(step, Flush):
                yield step

    def _part(self, step: Content, way: str) -> Content:
        """What there is of bytes of which "half" or "zeros" are on the disk; the same object each time."""
        if step.data is None:
            return step
        key = (id(step), way)
        if key not in self._parts:
            data = bytes(len(step.data)) if way == "zeros" else step.data[: len(step.data) // 2]
            self._parts[key] = Content(step.file, step.offset, data)
        return self._parts[key]


def _flushed(steps: Sequence[Step]) -> list[bool]:
    """Of each step, whether it is on the disk for sure."""
    flushed: set[int] = set()
    sure = []
    for step in reversed(steps):
        if isinstance(step, Flush):
            flushed.add(step.what)
            sure.append(True)
        else:
            sure.append((step.by if isinstance(step, Names) else step.file) in flushed)
    return sure[::-1]


def _lost(at: Sequence[int]) -> Iterator[frozenset[int]]:
    """Which of some changes are lost: any, or, of many, all but the first few, all but one, and one alone."""
    if len(at) <= _ALL_SUBSETS:
        for size in range(len(at) + 1):
            yield from map(frozenset, combinations(at, size))
        return
    yield from (frozenset(at[start:]) for start in range(len(at) + 1))
    for one in at:
        yield frozenset({one})
        yield frozenset(at) - {one}


def _ways(files: Sequence[int], *, few: bool) -> Iterator[dict[int, str]]:
    """What becomes of the bytes of files that were not flushed; nothing is said of those that are whole."""
    yield {}
    if files:
        for way in ("none", "zeros", "half"):
            yield dict.fromkeys(files, way)
        if len(files) > 1 and not few:
            yield from ({file: "none"} for file in files)
