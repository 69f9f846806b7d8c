"""What each module of the unmerged model reads and returns in float64, and how far rounding may move it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from loracle.reference import product_noise, unit_roundoff
from loracle.torch_impl.module_tree import base_modules, wrappers

from .truth import FACTOR, SAMPLES, Float64Model


@dataclass(frozen=True)
class Expected:
    """A value in float64, and how far a right evaluation in the precision under test may be off."""

    exact: NDArray[np.float64]
    tolerance: float


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        given: what it reads; None where that is no floating-point number.
        returned: what it returns.
    """

    given: Expected | None
    returned: Expected


@dataclass(frozen=True)
class ModuleValues:
    """A module with a weight.

    Attributes:
        weights: the names of its weight, of which a tied one has several.
        looks_up: whether it is an embedding.
        bias: what it adds to each row; None where it adds nothing.
        calls: in the order in which they were made.
    """

    path: str
    weights: tuple[str, ...]
    looks_up: bool
    bias: NDArray[np.float64] | None
    calls: tuple[Call, ...]


@dataclass
class _Seen:
    """A tensor that passes by: what it is exactly, and the largest deviation from that."""

    exact: Tensor
    deviation: float = 0.0


@dataclass
class _Watch:
    """Takes down what modules read and return, evaluation by evaluation; the first one is exact."""

    model: nn.Module
    seen: dict[str, list[tuple[_Seen | None, _Seen]]] = field(default_factory=lambda: defaultdict(list))
    odd: set[str] = field(default_factory=set)
    exact: bool = True
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.counts.clear()
        inside = wrappers(self.model)
        hooks = [
            inside.get(path, module).register_forward_hook(self._hook(path), with_kwargs=True)
            for path, module in weighted_modules(self.model).items()
        ]
        try:
            yield
        finally:
            self.exact = False
            for hook in hooks:
                hook.remove()

    def _hook(self, path: str) -> Any:
        def take(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            given = next((value for value in (*args, *named.values()) if isinstance(value, Tensor)), None)
            if isinstance(output, Tensor):
                self._take(path, given, output)

        return take

    def _take(self, path: str, given: Tensor | None, output: Tensor) -> None:
        call, self.counts[path] = self.counts[path], self.counts[path] + 1
        read = given if given is not None and given.is_floating_point() else None
        if self.exact:
            self.seen[path].append((None if read is None else _Seen(read.clone()), _Seen(output.clone())))
            return
        held = self.seen[path]
        pairs = [] if call >= len(held) else list(zip(held[call], (read, output), strict=True))
        if not pairs or any(
            own is not None and now is not None and own.exact.shape != now.shape for own, now in pairs
        ):
            # Noise may send tokens to other experts.
            self.odd.add(path)
            return
        for own, now in pairs:
            if own is not None and now is not None:
                own.deviation = max(own.deviation, float((now - own.exact).abs().max()))


def weighted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have a weight of their own, by their paths before anything was injected."""
    return {
        path: module
        for path, module in base_modules(model).items()
        if module._parameters.get("weight") is not None
    }


def module_values(
    model: Float64Model,
    feeds: Mapping[str, NDArray[Any]],
    dtype: np.dtype[Any],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> dict[str, ModuleValues]:
    """Evaluate the model once exactly and `samples` times with the rounding of `dtype`, and take down what
    its modules with weights read and return.

    A tolerance is `FACTOR` times the largest deviation seen, as for logits, or times what rounds a value
    though no product came before it: its own rounding, and that of a sum over its last axis, which a norm
    divides by, at the largest entry.

    Args:
        model: with the adapter beside its weights.
        feeds: of `Float64Model.evaluate_feeds`; one text or image is enough.
        dtype: in which the candidate is stored.
    """
    watch = _Watch(model.module)
    for _ in model.draws(feeds, dtype, samples=samples, seed=seed, watching=watch):
        pass
    modules = weighted_modules(model.module)
    sharing: dict[int, list[str]] = defaultdict(list)
    for path, module in modules.items():
        sharing[id(module._parameters["weight"])].append(f"{path}.weight")
    found = {}
    for path, module in modules.items():
        calls = tuple(
            Call(None if given is None else _expected(given, dtype), _expected(returned, dtype))
            for given, returned in watch.seen.get(path, ())
        )
        if calls and path not in watch.odd:
            bias = module._parameters.get("bias")
            added = None if bias is None else bias.detach().numpy().astype(np.float64)
            found[path] = ModuleValues(
                path,
                tuple(sharing[id(module._parameters["weight"])]),
                isinstance(module, nn.Embedding),
                added,
                calls,
            )
    return found


def _expected(seen: _Seen, dtype: np.dtype[Any]) -> Expected:
    exact: NDArray[np.float64] = seen.exact.detach().double().numpy()
    stored = unit_roundoff(dtype)
    summed = product_noise(exact.shape[-1] if exact.ndim else 1, min(stored, unit_roundoff(np.float32)), 1.0)
    largest = float(np.abs(exact).max(initial=0.0))
    least = (stored + float(summed)) * largest
    tolerance = FACTOR * max(seen.deviation, least)
    return Expected(exact, tolerance if math.isfinite(tolerance) else 0.0)
