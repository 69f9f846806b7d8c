"""`loracle bench`: what each way of adapting a model costs in latency, measured on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loracle.files import require_space
from loracle.reference import ConfigError, LoracleError

from ..options import GraphOptions
from ..verification.memory import available_memory
from .document import document_of
from .graphs import Graphs, MethodGraph, Positions
from .measure import measure
from .methods import CONTROL, METHODS, PREFIX, PROMPT
from .models import BenchModel, bench_model
from .report import row_of
from .runner import check_provider
from .settings import DECODE, PREFILL, Effort, Setting, check_context, parse_settings

Stage = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Called with a title; within it the yielded function is called with (done, total)."""

_COPIES = 3
"""Of the weights on the disk: the checkpoint of random weights, the base's and the merged model's."""


@dataclass(frozen=True)
class Wanted:
    """What is to be measured.

    Attributes:
        model: a folder, or a key of `models.GPT2`.
        settings: as `settings.parse_settings` takes them.
        methods: of `methods.METHODS`; None for all that the model has a place for.
        layers: how many the model is to have, with random weights; None for all.
        provider: of `runner.PROVIDERS`.
        dtype: of weights and cache, as `GraphOptions` has it.
        effort: how often.
        positions: of prefix and prompt.
    """

    model: str
    settings: str
    methods: tuple[str, ...] | None = None
    layers: int | None = None
    provider: str = "cpu"
    dtype: str = "fp32"
    effort: Effort = field(default_factory=Effort)
    positions: Positions = field(default_factory=Positions)


def bench(wanted: Wanted, stage: Stage | None = None) -> dict[str, Any]:
    """Measure, and return the result as `document.document_of` describes it. Nothing is left on the disk.

    Raises:
        ConfigError, FileError, TargetError: the model, a setting or a method cannot be measured, in one line.
    """
    show: Stage = stage or (lambda _: nullcontext(lambda done, total: None))
    check_provider(wanted.provider)
    GraphOptions(wanted.dtype)
    for name, count in (("prefix", wanted.positions.prefix), ("prompt", wanted.positions.prompt)):
        if count < 1:
            raise ConfigError(f"{name}: expected at least 1 position, got {count}")
    parse_settings(wanted.settings, 1)
    with tempfile.TemporaryDirectory(prefix="loracle-bench-") as folder:
        scratch = Path(folder)
        with show("model"):
            model = bench_model(wanted.model, wanted.layers, scratch)
        settings = parse_settings(wanted.settings, model.full_parameters)
        require_space(scratch, _COPIES * 4 * model.full_parameters * model.layers // model.full_layers)
        (scratch / "graphs").mkdir()
        with show("base graph") as advance:
            graphs = Graphs(model, scratch / "graphs", wanted.positions, wanted.dtype, advance)
        _check_room(wanted, settings, graphs, model)
        with show("graphs") as advance:
            made, left_out = _graphs(wanted, settings, graphs, model, advance)
        rows = _measure(wanted, settings, graphs, model, made, show)
    return document_of(model, wanted.provider, wanted.dtype, wanted.effort, rows, left_out)


def _graphs(
    wanted: Wanted,
    settings: Sequence[Setting],
    graphs: Graphs,
    model: BenchModel,
    advance: Callable[[int, int], None],
) -> tuple[dict[tuple[str, str], MethodGraph], dict[str, str]]:
    """The graphs by setting and method; and why methods that nobody has named are left out."""
    made: dict[tuple[str, str], MethodGraph] = {}
    left_out: dict[str, str] = {}
    names = METHODS if wanted.methods is None else wanted.methods
    for number, method in enumerate(names):
        try:
            for setting in settings:
                made[setting.name, method] = graphs.graph(method, model.budget(setting.parameters))
        except LoracleError as error:
            if wanted.methods is not None:
                raise
            left_out[method] = str(error)
        advance(number + 1, len(names))
    return made, left_out


def _measure(
    wanted: Wanted,
    settings: Sequence[Setting],
    graphs: Graphs,
    model: BenchModel,
    made: Mapping[tuple[str, str], MethodGraph],
    show: Stage,
) -> list[dict[str, Any]]:
    rows = []
    phases = (PREFILL, DECODE) if graphs.decoder else (PREFILL,)
    for setting in settings:
        own = {CONTROL: replace(graphs.base, method=CONTROL)}
        own |= {method: graph for (name, method), graph in made.items() if name == setting.name}
        with show(setting.name) as advance:
            found = measure(
                setting, graphs.base, own, phases, wanted.effort, graphs.vocabulary, wanted.provider, advance
            )
        rows += [
            row_of(model, setting, method, phase, found[method, phase], graphs.itemsize)
            for phase in phases
            for method in own
        ]
    return rows


def _check_room(wanted: Wanted, settings: Sequence[Setting], graphs: Graphs, model: BenchModel) -> None:
    """Raise ConfigError where a setting has more positions than the model, or needs more memory than there
    is: two sessions with their weights laid out anew, and the cache, logits and widest values of a pass."""
    named = METHODS if wanted.methods is None else wanted.methods
    before = [wanted.positions.prefix * (PREFIX in named), wanted.positions.prompt * (PROMPT in named)]
    check_context(settings, graphs.context, max(before))
    free = available_memory()
    for setting in settings:
        tokens = setting.batch * (setting.length + max(before) + 1)
        needed = 4 * graphs.base.model_bytes + tokens * graphs.token_bytes(setting.length)
        if wanted.provider == "cpu" and free is not None and needed > free:
            raise ConfigError(
                f"settings: {setting.name} of {model.name}: expected about {needed / 1e9:.1f} GB of memory, "
                f"found {free / 1e9:.1f} free; choose a smaller batch or length, or fewer --layers"
            )
