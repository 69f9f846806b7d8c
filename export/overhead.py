"""What an adapter costs that is left in the graph: nodes, and multiply-adds for each token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loracle.files import Adapter

from .adapter_inputs import adapted_layers
from .external import load_graph
from .template import GraphTemplate
from .unmerged import NODES_PER_LAYER

_PRODUCTS = ("FusedMatMul", "MatMul")


@dataclass(frozen=True)
class Overhead:
    """What a task in the form adapter-inputs has to compute, and a merged one has not.

    Attributes:
        nodes: that the graph has for the adapters of all tasks of its folder.
        multiply_adds: of one token and this adapter, the sum of `r (in + out)` over its layers.
        base_multiply_adds: of one token and the weights that the base's graph has products with.
    """

    nodes: int
    multiply_adds: int
    base_multiply_adds: int

    @property
    def share(self) -> float:
        """The multiply-adds as a share of the base's."""
        return self.multiply_adds / self.base_multiply_adds


def adapter_overhead(template: GraphTemplate, adapter: Adapter, graph: Path) -> Overhead:
    """The overhead of an adapter, counted.

    Args:
        template: the base's graph.
        adapter: lora_A and lora_B of some of its linear layers.
        graph: that has them among its inputs.
    """
    return Overhead(
        NODES_PER_LAYER * len(adapted_layers(load_graph(graph).graph)),
        sum(pair.A.size + pair.B.size for pair in adapter.pairs.values()),
        base_multiply_adds(template),
    )


def base_multiply_adds(template: GraphTemplate) -> int:
    """Multiply-adds of one token and the weights of a graph's matrix products, without attention's own."""
    initializers = template.model.graph.initializers
    total = 0
    for node in template.model.graph:
        weight = node.inputs[1] if node.op_type in _PRODUCTS else None
        if weight is not None and str(weight.name) in initializers and weight.shape is not None:
            rows, columns = (int(size) for size in weight.shape.numpy())
            total += rows * columns
    return total
