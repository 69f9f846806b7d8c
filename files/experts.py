"""A mixture's experts, whose weights are stacked in some checkpoints and adapters and one by one in others.

``<path>.experts.gate_up_proj``, (E, 2 I, H), holds the rows of ``<path>.experts.<e>.<gate>.weight`` and then
of ``<path>.experts.<e>.<up>.weight``, (I, H) each, for every expert e.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.reference import TargetError, expert_factors_from_peft

from .adapter import Adapter
from .adapter_checks import wrappers_of
from .architectures import Experts
from .base_tensors import BaseTensors
from .lora_pair import LoraPair
from .parameters import name_parameters
from .updates import Update, conversion_bound, convert

_OF_EXPERT = re.compile(r"(?P<module>.+\.experts)\.(?P<expert>\d+)\.(?P<part>[^.]+)")
_OTHER = "is this adapter for another model?"


@dataclass(frozen=True)
class Place:
    """Where a weight of one expert lies: parameter, expert, and which of the parts that share its rows."""

    parameter: str
    expert: int
    part: int

    @property
    def key(self) -> tuple[int, int]:
        """The expert and the part."""
        return self.expert, self.part


def place_of(path: str, experts: Experts) -> Place | None:
    """Return where the weight of the module at ``path`` lies when it is stacked; None for other modules."""
    found = _OF_EXPERT.fullmatch(path)
    for name, parts in experts.items() if found else ():
        if found is not None and found["part"] in parts:
            return Place(f"{found['module']}.{name}", int(found["expert"]), parts.index(found["part"]))
    return None


def own_names(parameter: str, count: int, experts: Experts) -> tuple[str, ...]:
    """Return the names of the weights that a stacked parameter of ``count`` experts holds, in its order.

    There are none where ``parameter`` is not one of ``experts``.
    """
    module, _, name = parameter.rpartition(".")
    if module.rpartition(".")[2] != "experts":
        return ()
    return tuple(f"{module}.{e}.{part}.weight" for e in range(count) for part in experts.get(name, ()))


def named_experts(adapter: Adapter, experts: Experts) -> Adapter:
    """Return the adapter with names for its stacked parameters, where ``experts`` tells their order.

    A module that is none of experts is a router, with one parameter, ``weight``.

    Raises what `name_parameters` does.
    """
    config = adapter.config
    modules = wrappers_of(config, adapter.pairs).stacked
    unnamed = [p for p, pair in adapter.pairs.items() if pair.kind == "parameter"]
    if not experts or all(config.targets_parameter(path) for path in unnamed):
        return adapter
    return name_parameters(
        adapter,
        {
            module: tuple(
                name
                for name in (experts if module.rpartition(".")[2] == "experts" else ("weight",))
                if config.targets_parameter(f"{module}.{name}")
            )
            for module in modules
        },
    )


def pairs_of_experts(
    base: BaseTensors, path: str, pair: LoraPair, rank: int
) -> Iterator[tuple[str, LoraPair]]:
    """Yield what a stacked parameter's pair is to each weight of a checkpoint that has not stacked them.

    Nothing where the checkpoint has no such experts. The pairs' arrays are views.

    Raises:
        TargetError: the pair has another number of experts, or other shapes.
    """
    count = pair.r // rank
    names = [base.find(name) for name in own_names(path, count + 1, base.experts)]
    if not names or names[0] not in base:
        return
    parts = len(names) // (count + 1)
    *names, beyond = names[: 1 - parts or None]
    shapes = [base.shape(name) for name in names if name in base]
    heights = [shape[0] for shape in shapes[:parts]]
    matrix = (sum(heights), shapes[0][1])
    if beyond in base or len(shapes) < len(names) or pair.shape not in (matrix, matrix[::-1]):
        got = "more" if beyond in base else len(shapes) // parts
        raise TargetError(
            f"{names[0]}: expected {count} experts whose rows are {pair.shape}, as the adapter has them for "
            f"{path}, got {got} of {matrix}; {_OTHER}"
        )
    if matrix == matrix[::-1]:
        raise TargetError(
            f"{path}: updates (out, in) or (in, out) of each expert, which its shape {pair.shape} does not "
            f"tell; merge it in memory, with loracle.torch_impl.merge"
        )
    A, B = expert_factors_from_peft(pair.A, pair.B, count)
    if pair.shape != matrix:  # as older versions of PEFT have it
        A, B = B.transpose(0, 2, 1), A.transpose(0, 2, 1)
    stops = np.cumsum(heights)
    for number, name in enumerate(names):
        expert, part = divmod(number, parts)
        own = B[expert, stops[part] - heights[part] : stops[part]]
        yield name, LoraPair(A[expert], own, pair.scaling)


@dataclass(frozen=True, eq=False)
class OwnUpdates:
    """Updates of single experts in a stacked weight (E, parts * out, in).

    Attributes:
        updates: expert and part to the update of its rows.
        parts: how many weights share the rows of an expert.
    """

    updates: Mapping[tuple[int, int], Update]
    parts: int

    def rows(
        self, base: NDArray[Any], start: int, target: np.dtype[Any], threads: int | None, label: str
    ) -> NDArray[Any]:
        """See `Update`."""
        merged = np.empty(base.shape, target)
        height = base.shape[1] // self.parts
        for place, matrix in enumerate(base):
            for part in range(self.parts):
                rows = slice(part * height, (part + 1) * height)
                update = self.updates.get((start + place, part))
                own = f"{label.partition('[')[0]}[{start + place}]"
                merged[place, rows] = (
                    convert(matrix[rows], target, own)
                    if update is None
                    else update.rows(matrix[rows], 0, target, threads, own)
                )
        return merged

    def bound(
        self, base: NDArray[Any], start: int, precision: np.dtype[Any], target: np.dtype[Any]
    ) -> NDArray[np.float64]:
        """See `Update`."""
        bounds = np.empty(base.shape)
        height = base.shape[1] // self.parts
        for place, matrix in enumerate(base):
            for part in range(self.parts):
                rows = slice(part * height, (part + 1) * height)
                update = self.updates.get((start + place, part))
                bounds[place, rows] = (
                    conversion_bound(matrix[rows], precision, target)
                    if update is None
                    else update.bound(matrix[rows], 0, precision, target)
                )
        return bounds
