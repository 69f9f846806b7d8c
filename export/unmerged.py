"""A decoder with its adapter left in the graph: `y = x W0^T + scaling * (x A^T) B^T`.

It carries the adapter's overhead and exists to measure it: what merging saves is the difference in speed
between this graph and the merged one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from loracle.files import Adapter, Checkpoint, MergedWeights, copy_sidecars, output_folder, read_adapter
from loracle.reference import TargetError

from .architecture import check_supported
from .graphs import graph_template
from .names import GRAPH_FILE
from .options import GraphOptions
from .template import GraphTemplate
from .write import write_models

_DOMAIN = "com.microsoft"


def add_adapter(template: GraphTemplate, adapter: Adapter) -> None:
    """Put two products and a sum beside each adapted product of `template`, in place.

    Raises TargetError where an adapted weight is not used by exactly one product, or the adapter is more than
    lora_A and lora_B of linear layers.
    """
    graph = template.model.graph
    more = [*adapter.tensors, *adapter.tokens]
    for path, pair in adapter.pairs.items():
        if pair.kind != "linear" or pair.bias is not None or pair.magnitude is not None:
            more.append(path)
    if more:
        raise TargetError(
            f"{more[0]}: expected lora_A and lora_B of linear layers alone to leave in the graph, got more; "
            "export the merged model"
        )
    for path, pair in adapter.pairs.items():
        weight = f"{path}.weight"
        uses = list(graph.initializers[weight].uses()) if weight in graph.initializers else []
        if len(uses) != 1 or uses[0].node.op_type != "FusedMatMul":
            raise TargetError(f"{weight}: expected one product that uses it, found {len(uses)} uses")
        product = uses[0].node
        a = _constant(graph, f"{path}.lora_A.weight", pair.A.astype(template.dtype))
        b = _constant(graph, f"{path}.lora_B.weight", pair.B.astype(template.dtype))
        down = ir.node("FusedMatMul", [product.inputs[0], a], {"transB": 1}, domain=_DOMAIN)
        up = ir.node(
            "FusedMatMul",
            [down.outputs[0], b],
            {"transB": 1, "alpha": float(pair.scaling)},
            domain=_DOMAIN,
        )
        total = ir.node("Add", [product.outputs[0], up.outputs[0]])
        for node in (down, up, total):
            node.outputs[0].dtype = product.outputs[0].dtype
        down.outputs[0].name = f"{path}.lora_A"
        up.outputs[0].name = f"{path}.lora_B"
        total.outputs[0].name = f"{path}.adapted"
        product.outputs[0].replace_all_uses_with(total.outputs[0])
        total.replace_input_with(0, product.outputs[0])
        graph.insert_after(product, [down, up, total])


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
