"""LoRA as the paper has it, query and value, for any graph: an adapter of random numbers.

An adapter is what timing needs of it, its shapes. Query and value that one weight holds are adapted together,
as PEFT does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from loracle.files import Adapter, LoraConfig
from loracle.files.matching import matches
from loracle.reference import TargetError

from ..recipes import TRANSPOSED
from ..template import GraphTemplate
from ..unmerged import product_of
from .bottlenecks import Draw

_SUFFIX = ".weight"


def lora_layers(template: GraphTemplate, model_type: str) -> Mapping[str, tuple[int, int, bool]]:
    """(out, in, whether the weight is stored (in, out)) of the layers of query and value, by their paths.

    Args:
        template: with products apart.
        model_type: of the model's configuration.

    Raises TargetError where they are not known, or not used by one product each.
    """
    from loracle.torch_impl.architectures import default_targets

    graph = template.model.graph
    paths = [
        name.removesuffix(_SUFFIX)
        for name in template.aliases
        if name.endswith(_SUFFIX) and len(template.shape(name)) == 2
    ]
    names = default_targets(model_type, paths)
    if not names:
        raise TargetError(
            f"lora: expected an architecture whose query and value are known, got {model_type}; leave LoRA "
            "out of --methods"
        )
    return {path: _sizes(graph, path, template) for path in paths if matches(path, names)}


def lora_parameters(layers: Mapping[str, tuple[int, int, bool]], rank: int) -> int:
    """Numbers in A and B of all layers."""
    return sum(rank * (out + inner) for out, inner, _ in layers.values())


def random_adapter(layers: Mapping[str, tuple[int, int, bool]], rank: int, draw: Draw) -> Adapter:
    """An adapter of these layers with scaling 1."""
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=tuple(layers),
        fan_in_fan_out=any(stored for _, _, stored in layers.values()),
    )
    arrays = {
        path: (draw(f"{path}.lora_A.weight", (rank, inner)), draw(f"{path}.lora_B.weight", (out, rank)))
        for path, (out, inner, _) in layers.items()
    }
    return Adapter.from_arrays(config, arrays)


def adapter_tensors(adapter: Adapter, weights: Mapping[str, str]) -> dict[str, Any]:
    """A and B by the names that the graph's inputs for them have, for an adapter with scaling 1.

    Args:
        weights: the adapter's layers to their weights in the graph.
    """
    tensors = {}
    for path, pair in adapter.pairs.items():
        layer = weights[path].removesuffix(_SUFFIX)
        tensors[f"{layer}.lora_A.weight"] = pair.A
        tensors[f"{layer}.lora_B.weight"] = pair.B
    return tensors


def _sizes(graph: ir.Graph, path: str, template: GraphTemplate) -> tuple[int, int, bool]:
    weight = f"{path}{_SUFFIX}"
    rows, columns = template.shape(weight)
    # A portable graph has the rows of a weight that is stored (out, in) as columns.
    turned = any(made.recipe == TRANSPOSED and made.sources == (weight,) for made in template.made.values())
    stored = not turned and product_of(graph, weight).op_type == "MatMul"
    return (columns, rows, True) if stored else (rows, columns, False)
