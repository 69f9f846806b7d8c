"""What an adapter is, as a certificate names it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loracle.files import Adapter

from ..task_document import target_names


@dataclass(frozen=True)
class AdapterSummary:
    """What an adapter is.

    Attributes:
        r: the ranks of its pairs, sorted and distinct.
        scaling: their scalings, likewise.
        kinds: of the weights that they update, likewise: "linear", "embedding", "convolution", "parameter".
        target_modules: the last names of their paths, likewise.
        pairs: how many.
        parameters: the entries of all tensors.
    """

    r: tuple[int, ...]
    lora_alpha: float
    scaling: tuple[float, ...]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    kinds: tuple[str, ...]
    target_modules: tuple[str, ...]
    pairs: int
    parameters: int

    def to_json(self) -> dict[str, Any]:
        """The fields, as JSON has them."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()
        }


def adapter_summary(adapter: Adapter) -> AdapterSummary:
    """Return what is said of an adapter."""
    config, pairs = adapter.config, adapter.pairs
    return AdapterSummary(
        tuple(sorted({config.rank_of(path) for path in pairs})),
        config.lora_alpha,
        tuple(sorted({pair.scaling for pair in pairs.values()})),
        config.use_rslora,
        config.use_dora,
        config.fan_in_fan_out,
        tuple(sorted({pair.kind for pair in pairs.values()})),
        tuple(target_names(adapter)),
        len(pairs),
        adapter.parameters,
    )
