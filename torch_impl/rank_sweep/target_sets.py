"""Sets of weights by the paper's letters, whatever an architecture calls its layers."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from loracle.files.matching import matches
from loracle.reference import ConfigError, TargetError

from ..module_tree import base_modules
from ..targets import is_plain_linear, parse_targets

LETTERS = ("q", "qk", "qv", "qkv", "qkvo", "k", "v", "o", "kv")
"""Sets that are named by what the attention's projections are for, as in the LoRA paper, section 7.1."""

_PROJECTIONS: tuple[dict[str, tuple[str, ...]], ...] = (
    {"q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "o": ("o_proj", "out_proj")},
    {"q": ("query",), "k": ("key",), "v": ("value",), "o": ("attention.output.dense",)},
    {"q": ("q_lin",), "k": ("k_lin",), "v": ("v_lin",), "o": ("out_lin",)},
    {
        letter: (f"SelfAttention.{letter}", f"EncDecAttention.{letter}")
        for letter in ("q", "k", "v", "o")
    },
)  # fmt: skip


def parse_target_sets(text: str) -> tuple[str, ...]:
    """Return the sets that a list with semicolons between names, each as it was written.

    Raises:
        ConfigError: there is none.
    """
    sets = tuple(part.strip() for part in text.split(";") if part.strip())
    if not sets:
        raise ConfigError(f"targets: expected sets such as q;qv;qkvo with semicolons between, got {text!r}")
    return sets


def target_modules(model: nn.Module, name: str) -> tuple[str, ...] | str:
    """Return the ``target_modules`` that a set stands for in a model.

    Args:
        model: as it came.
        name: one of `LETTERS`; ``"attention"`` or ``"all-linear"``; or names of layers, commas between.

    Raises:
        TargetError: the model has no layer of its own for one of the letters.
        ConfigError: no name is given.
    """
    if name not in LETTERS:
        return parse_targets(name)
    modules = base_modules(model)
    paths = [path for path, module in modules.items() if path and is_plain_linear(module, path, modules)]
    for family in _PROJECTIONS:
        found = [_present(family[letter], paths) for letter in name]
        if all(found):
            return tuple(one for names in found for one in names)
    kind: Any = type(model).__name__
    raise TargetError(
        f"targets: expected a layer of its own for each letter of {name!r}, which {kind} has not, or not by "
        "a known name; name layers, commas between, or say all-linear"
    )


def _present(names: Iterable[str], paths: Iterable[str]) -> list[str]:
    return [name for name in names if any(matches(path, (name,)) for path in paths)]
