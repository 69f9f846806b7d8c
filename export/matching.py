"""Which tensor of a checkpoint is which weight of a graph."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np

from loracle.files.architectures import Architecture
from loracle.files.tensor_names import TensorNames
from loracle.reference import ShapeError, TargetError

from .template import GraphTemplate


class WeightSource(Protocol):
    """What the graph's weights are read from, one tensor at a time (`loracle.files.MergedWeights`)."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def merged_names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str, dtype: Any = None) -> np.ndarray[Any, Any]: ...

    def rows(self, name: str, start: int, stop: int, dtype: Any = None) -> np.ndarray[Any, Any]: ...

    def base_tensor(self, name: str, dtype: Any = None) -> np.ndarray[Any, Any] | None: ...

    def release(self, name: str) -> None: ...


def names_in_checkpoint(templates: Sequence[GraphTemplate], source: WeightSource) -> dict[str, str]:
    """For each weight of the graphs its name in `source`, whose tensors must all be the model's; those that
    an adapter changes must be used.

    A checkpoint may use names of an older layout, and have or lack the prefix of the model without its head.

    Args:
        templates: the graphs of one model.

    Raises TargetError or ShapeError, naming the tensor, before anything is written.
    """
    weights = {weight: template for template in templates for weight in template.aliases}
    known = {alias for weight, template in weights.items() for alias in template.aliases[weight]}
    architecture = Architecture(templates[0].prefix, renames=templates[0].renames)
    # The other way round: the model's names, found by those of the checkpoint.
    model = TensorNames(known.union(*(template.unused for template in templates)), architecture)
    ignored = [pattern for template in templates for pattern in template.ignored]
    held: dict[str, str] = {}
    for name in source.names:
        alias = model.find(name)
        if alias is not None:
            if alias in held:
                raise TargetError(
                    f"{name}: in the checkpoint, and so is {held[alias]}, the same weight of the model; "
                    "save the model again with transformers"
                )
            held[alias] = name
        elif not any(re.search(pattern, name) for pattern in ignored):
            raise TargetError(
                f"{name}: in the checkpoint, but the graph has no such weight; "
                "config.json and the weights belong to different models"
            )
    idle = {name for alias, name in held.items() if alias not in known}
    for name in source.merged_names:
        if name in idle:
            raise TargetError(
                f"{name}: the adapter changes it, but no output of the graph depends on it; "
                "train an adapter for what is exported"
            )
    return {weight: _checkpoint_name(template, weight, held, source) for weight, template in weights.items()}


def _checkpoint_name(template: GraphTemplate, weight: str, held: dict[str, str], source: WeightSource) -> str:
    names = [held[alias] for alias in template.aliases[weight] if alias in held]
    if not names:
        raise TargetError(
            f"{weight}: expected in the checkpoint, found none of {', '.join(template.aliases[weight])}; "
            "config.json and the weights belong to different models"
        )
    expected = template.shape(weight)
    for name in names:
        if tuple(source.shape(name)) != expected:
            raise ShapeError(
                f"{name}: expected shape {expected} as config.json has it, got {source.shape(name)}"
            )
    first, *others = names
    for other in others:
        if not np.array_equal(source.tensor(first).view(np.uint8), source.tensor(other).view(np.uint8)):
            raise TargetError(
                f"{other}: config.json ties it to {first}, but the checkpoint holds different values; "
                "set tie_word_embeddings to false if they are meant to differ"
            )
    return first
