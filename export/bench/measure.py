"""Every method against full fine-tuning, in one process, two sessions at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import onnxruntime

from .graphs import MethodGraph
from .pairs import Block, blocks_of
from .runner import Runner, open_method
from .settings import Effort, Setting

Progress = Callable[[int, int], None]


@dataclass
class Measured:
    """The blocks of one method in one setting and phase, a tuple for each round."""

    graph: MethodGraph
    rounds: list[tuple[Block, ...]] = field(default_factory=list)


def measure(
    setting: Setting,
    base: MethodGraph,
    methods: Mapping[str, MethodGraph],
    phases: Sequence[str],
    effort: Effort,
    vocabulary: int,
    provider: str,
    progress: Progress | None = None,
) -> dict[tuple[str, str], Measured]:
    """Measure a setting; the result's keys are (method, phase).

    Each round opens the sessions of every pair anew: where a session's memory happens to lie makes it a
    percent or more faster or slower for as long as it lives. In every second round the pairs come in the
    other order, in each the method's session is opened first, and blocks begin with it.

    Args:
        base: of full fine-tuning.
        methods: by their names, the control among them.
        phases: of `settings.PHASES`.
        progress: called with (pairs of sessions measured, such pairs in all).
    """
    found = {(name, phase): Measured(graph) for name, graph in methods.items() for phase in phases}
    done, total = 0, effort.rounds * len(methods)
    with _quick_collections():
        for number in range(effort.rounds):
            flipped = number % 2 == 1
            names = list(methods)[:: -1 if flipped else 1]
            for name in names:
                blocks = _pair(setting, base, methods[name], phases, effort, vocabulary, provider, flipped)
                for phase, own in blocks.items():
                    found[name, phase].rounds.append(own)
                done += 1
                if progress is not None:
                    progress(done, total)
    return found


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Within the block Python's garbage collector passes over what is there already: it is asked for before
    each pair is measured, and would look through all modules."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _pair(
    setting: Setting,
    base: MethodGraph,
    method: MethodGraph,
    phases: Sequence[str],
    effort: Effort,
    vocabulary: int,
    provider: str,
    flipped: bool,
) -> dict[str, tuple[Block, ...]]:
    """Open both sessions, measure each phase, and let go of them."""
    held: dict[tuple[object, ...], onnxruntime.OrtValue] = {}
    opened = {}
    for name in ("method", "base") if flipped else ("base", "method"):
        graph = method if name == "method" else base
        session = open_method(graph, provider, effort.threads)
        opened[name] = Runner(graph, session, setting, vocabulary, provider, held)
    return {
        phase: blocks_of(
            opened["base"].call(phase),
            opened["method"].call(phase),
            effort.blocks,
            effort.window,
            flipped=flipped,
        )
        for phase in phases
    }
