"""An adapter of single experts as one of stacked experts, which is how transformers' models hold them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from loracle.files import Adapter, LoraPair
from loracle.files.architectures import architecture_of
from loracle.files.experts import place_of
from loracle.reference import TargetError

Array = np.ndarray[Any, Any]


def with_experts_stacked(adapter: Adapter, model: Any) -> Adapter:
    """Return the adapter with its experts and routers as updates of the model's parameters; itself if it has
    no experts of its own.

    Of an expert's modules that share the rows of a parameter the update is block-diagonal. Scalings are
    multiplied into lora_B, in float64.

    Args:
        adapter: with the module paths of a model whose experts are modules.
        model: transformers'.

    Raises:
        TargetError: an expert's update is more than lora_A and lora_B, or the model has no such experts.
    """
    architecture = architecture_of(model.config.to_dict())
    if architecture is None or not architecture.experts:
        return adapter
    paths = {path: path for path in adapter.pairs}
    for pattern, target in architecture.renames:
        paths = {path: re.sub(pattern, target, own) for path, own in paths.items()}
    places = {path: place_of(own, architecture.experts) for path, own in paths.items()}
    if not any(places.values()):
        return adapter
    modules = dict(model.named_modules())
    pairs: dict[str, LoraPair] = {}
    stacks: dict[str, dict[tuple[int, int], LoraPair]] = defaultdict(dict)
    for path, pair in adapter.pairs.items():
        own, place = paths[path], places[path]
        scaled = _scaled(pair)
        if place is not None:
            if pair.bias is not None or pair.magnitude is not None:
                raise TargetError(
                    f"{path}: expected lora_A and lora_B alone for an expert, got more; "
                    "its model cannot be evaluated unmerged"
                )
            stacks[place.parameter][place.key] = scaled
        elif isinstance(modules.get(own), nn.Linear | nn.Embedding):
            pairs[own] = scaled
        else:
            pairs[f"{own}.weight"] = replace(scaled, kind="parameter")
    for parameter, own_pairs in stacks.items():
        module, _, name = parameter.rpartition(".")
        if module not in modules:
            raise TargetError(
                f"{module}: expected in the model, found none; is this adapter for another model?"
            )
        shape = tuple(modules[module].get_parameter(name).shape)
        pairs[parameter] = _stacked(own_pairs, shape, len(architecture.experts[name]))
    parameters = tuple(path for path, pair in pairs.items() if pair.kind == "parameter")
    ranks = {path: _rank(pair, modules, path) for path, pair in pairs.items()}
    patterns: Mapping[str, int] = {re.escape(path): rank for path, rank in ranks.items()}
    config = replace(
        adapter.config,
        target_modules=tuple(path for path in pairs if path not in parameters) or None,
        target_parameters=parameters,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=patterns,
        alpha_pattern=patterns,
        use_rslora=False,
        lora_dropout=0.0,
    )
    return replace(adapter, config=config, pairs=pairs)


def _scaled(pair: LoraPair) -> LoraPair:
    bias = None if pair.bias is None else pair.bias.astype(np.float64) * pair.scaling
    return replace(pair, B=pair.B.astype(np.float64) * pair.scaling, bias=bias, scaling=1.0)


def _rank(pair: LoraPair, modules: Mapping[str, nn.Module], path: str) -> int:
    """Return the rank of one weight."""
    module, _, name = path.rpartition(".")
    if pair.kind != "parameter":
        return pair.r
    shape = modules[module].get_parameter(name).shape
    return pair.r // (shape[0] if len(shape) == 3 else 1)


def _stacked(pairs: Mapping[tuple[int, int], LoraPair], shape: tuple[int, ...], parts: int) -> LoraPair:
    """Return the update of a parameter (E, parts * out, in), in PEFT's layout, from those of its weights."""
    experts, rows, columns = shape
    ranks = [
        max((pair.r for (_, own), pair in pairs.items() if own == part), default=0) for part in range(parts)
    ]
    A = np.zeros((experts, sum(ranks), columns))
    B = np.zeros((experts, rows, sum(ranks)))
    for (expert, part), pair in pairs.items():
        first, height = sum(ranks[:part]), rows // parts
        A[expert, first : first + pair.r] = pair.A
        B[expert, part * height : (part + 1) * height, first : first + pair.r] = pair.B
    return LoraPair(A.reshape(-1, columns), B.transpose(1, 2, 0).reshape(rows, -1), 1.0, "parameter")
