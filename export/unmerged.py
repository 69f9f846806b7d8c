"""A decoder with its adapter left in the graph: `y = x W0^T + scaling * (x A^T) B^T`.

It carries the adapter's overhead. `export_unmerged` exists to measure it: what merging saves is the
difference in speed between this graph and the merged one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from loracle.files import Adapter, Checkpoint, MergedWeights, copy_sidecars, output_folder, read_adapter
from loracle.files.architectures import Architecture
from loracle.files.tensor_names import TensorNames
from loracle.reference import TargetError

from .architecture import check_supported
from .graphs import graph_template
from .names import GRAPH_FILE
from .options import GraphOptions
from .template import GraphTemplate
from .write import write_models

_DOMAIN = "com.microsoft"
NODES_PER_LAYER = 3
"""Two products and a sum."""
_PRODUCTS = {"FusedMatMul": {"transB": 1}, "MatMul": {}}
"""How a layer multiplies by its weight, stored (out, in) or (in, out)."""


def adapted_weights(template: GraphTemplate, adapter: Adapter) -> dict[str, str]:
    """For each layer that an adapter updates the weight in a graph, which one product uses.

    Raises TargetError where the adapter is more than lora_A and lora_B of linear layers, or a weight is not
    used by exactly one product.
    """
    more = [*adapter.tensors, *adapter.tokens]
    for path, pair in adapter.pairs.items():
        if pair.kind != "linear" or pair.bias is not None or pair.magnitude is not None:
            more.append(path)
    if more:
        raise TargetError(
            f"{more[0]}: expected lora_A and lora_B of linear layers alone to leave in the graph, got more; "
            "export the merged model"
        )
    weights = {alias: weight for weight, aliases in template.aliases.items() for alias in aliases}
    names = TensorNames(weights, Architecture(template.prefix, renames=template.renames))
    found = {}
    for path in adapter.pairs:
        name = f"{path}.weight"
        found[path] = weights.get(names.find(name) or name, name)
        product_of(template.model.graph, found[path])
    return found


def product_of(graph: ir.Graph, weight: str) -> ir.Node:
    """The only product that uses a weight. Raises TargetError where that is not the weight's only use."""
    uses = list(graph.initializers[weight].uses()) if weight in graph.initializers else []
    if len(uses) == 1 and uses[0].idx == 1:
        node = uses[0].node
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if _PRODUCTS.get(node.op_type) == attributes:
            return node
    raise TargetError(
        f"{weight}: expected one product that uses it, to leave an adapter beside it, found {len(uses)} uses "
        "in the graph; export the merged model"
    )


def put_beside(product: ir.Node, path: str, a: ir.Value, b: ir.Value, scaling: float = 1.0) -> None:
    """Add `scaling * (x A^T) B^T` to a product `x W0^T`: two products and a sum, in place.

    Args:
        product: of the graph.
        path: of the layer, which the results are named after.
        a: A, (r, in).
        b: B, (out, r).
    """
    graph, result = product.graph, product.outputs[0]
    assert isinstance(graph, ir.Graph)
    down = ir.node("FusedMatMul", [product.inputs[0], a], {"transB": 1}, domain=_DOMAIN)
    scale = {} if scaling == 1.0 else {"alpha": float(scaling)}
    up = ir.node("FusedMatMul", [down.outputs[0], b], {"transB": 1, **scale}, domain=_DOMAIN)
    total = ir.node("Add", [result, up.outputs[0]])
    for node in (down, up, total):
        node.outputs[0].dtype = result.dtype
    total.outputs[0].shape = result.shape
    down.outputs[0].name = f"{path}.lora_A"
    up.outputs[0].name = f"{path}.lora_B"
    total.outputs[0].name = f"{path}.adapted"
    if result.is_graph_output():
        total.outputs[0].name, result.name = result.name, f"{path}.base"
        graph.outputs[graph.outputs.index(result)] = total.outputs[0]
    result.replace_all_uses_with(total.outputs[0])
    total.replace_input_with(0, result)
    graph.insert_after(product, [down, up, total])


def add_adapter(template: GraphTemplate, adapter: Adapter) -> None:
    """Put two products and a sum beside each adapted product of `template`, in place.

    Raises TargetError where an adapted weight is not used by exactly one product, or the adapter is more than
    lora_A and lora_B of linear layers.
    """
    graph = template.model.graph
    for path, weight in adapted_weights(template, adapter).items():
        pair = adapter.pairs[path]
        a = _constant(graph, f"{path}.lora_A.weight", pair.A.astype(template.dtype))
        b = _constant(graph, f"{path}.lora_B.weight", pair.B.astype(template.dtype))
        put_beside(product_of(graph, weight), path, a, b, pair.scaling)


def _constant(
    graph: ir.Graph, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
) -> ir.Value:
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def export_unmerged(
    model_dir: str | Path, adapter_dir: str | Path, out_dir: str | Path, *, dtype: str = "fp32"
) -> None:
    """Write the base model with the adapter beside its weights, unmerged, as an ONNX folder."""
    options = GraphOptions(dtype, packed=False)
    with Checkpoint(model_dir) as checkpoint:
        adapter = read_adapter(adapter_dir)
        MergedWeights(checkpoint, adapter)  # refuses an adapter of another model
        task = check_supported(checkpoint.config, str(Path(model_dir) / "config.json"))
        with output_folder(out_dir) as folder:
            template = graph_template(checkpoint, checkpoint.config, task, options)
            add_adapter(template, adapter)
            write_models({GRAPH_FILE: template}, MergedWeights(checkpoint, None), folder)
            copy_sidecars(checkpoint.dir, folder)
