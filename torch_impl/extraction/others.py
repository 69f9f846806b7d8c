"""What differs and is no low-rank update: which of it an adapter can bring whole, and how."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.files import Checkpoint

from .kinds import module_of
from .pairing import TensorPair, distance
from .summary import OtherTensor

_BIAS = "bias"


@dataclass(frozen=True, eq=False)
class Others:
    """Whole tensors of an adapter, and the keys of its configuration for them.

    Attributes:
        report: of each tensor that differs.
        tensors: the base's name to the tuned tensor.
        modules_to_save: paths of the modules that are saved whole, or None.
        bias: as `LoraConfig` has it.
    """

    report: tuple[OtherTensor, ...]
    tensors: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] | None = None
    bias: str = "none"


def save_others(
    base: Checkpoint,
    tuned: Checkpoint,
    pairs: Sequence[TensorPair],
    others: Mapping[str, str],
    adapted: Collection[str],
    *,
    rest: bool,
) -> Others:
    """Return what of the other tensors that differ the adapter brings.

    A bias beside a weight with an update, or of any other linear layer, is a trained bias. Of all else the
    module is saved whole, unless one with an update lies in it.

    Args:
        base, tuned: open.
        pairs: all tensors.
        others: name of a tensor that differs to what it is.
        adapted: paths of the modules with an update.
        rest: whether anything is brought.
    """
    sources = {pair.name: pair.source for pair in pairs}
    biases, modules, report = [], [], []
    for name, what in others.items():
        why = what if rest else f"{what}; --rest saves it"
        saved = False
        if rest:
            module = module_of(name)
            if name.endswith(f".{_BIAS}") and _is_linear(base, module, adapted):
                biases.append(name)
                saved = True
            elif module and not any(own == module or own.startswith(f"{module}.") for own in adapted):
                modules.append(module)
                saved = True
            else:
                why = f"{what}, in a module with layers that have updates"
        norm = distance(base.tensor(name), tuned.tensor(sources[name]))
        base.release(name)
        tuned.release(sources[name])
        report.append(OtherTensor(name, base.shape(name), norm, saved, why))
    chosen = tuple(dict.fromkeys(modules))
    names = [*biases, *(name for name in sources if module_of(name) in chosen)]
    everywhere = any(module_of(name) not in adapted for name in biases)
    return Others(
        tuple(report),
        {name: np.array(tuned.tensor(sources[name])) for name in dict.fromkeys(names)},
        chosen or None,
        ("all" if everywhere else "lora_only") if biases else "none",
    )


def _is_linear(base: Checkpoint, module: str, adapted: Collection[str]) -> bool:
    """Whether a module has a matrix beside its bias, so that saving it whole would cost more."""
    weight = f"{module}.weight"
    return module in adapted or (weight in base and len(base.shape(weight)) == 2)
