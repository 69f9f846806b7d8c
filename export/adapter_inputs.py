"""A task that is run unmerged: lora_A and lora_B are inputs beside the base's weights.

    DIR/model.onnx, DIR/model.onnx_data    the base's graph and weights, and beside every product that some
                                           task adapts `(x A^T) B^T`; A and B are inputs, by default of rank 0
    DIR/french.onnx_adapter                the task `french`: its A and B, under the names of these inputs

For runtimes that switch adapters of one session: onnxruntime (`LoraAdapter`, `RunOptions.add_active_adapter`)
and onnxruntime-genai (`Adapters`, `Generator.set_active_adapter`). It carries the adapter's overhead, two
products and a sum in each adapted layer, in every task of the folder and in the base: see `overhead.py`. The
other forms have none.

An input that is not given is its default, a matrix of rank 0, whose product adds zero: without a task the
folder is the base model. The rank is a dimension that each layer leaves open, so that tasks of any ranks, and
of any targets, share the graph.

lora_B is stored times `scaling`, each entry the exact product rounded once to the graph's dtype. Nothing is
lost in float32 where `scaling` is a power of two, as alpha / r mostly is; else up to half a unit in the last
place of each entry.

A task appears, changes and goes in one step, the rename or removal of its file. The graph is exchanged
before, in one step too, where the task adapts layers that no task did.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.files import Adapter, LoraPair, require_space
from loracle.files.atomic import flush_folder, reported, write_atomic
from loracle.files.lock import locked
from loracle.files.partial import partial_file, remove_abandoned
from loracle.reference import ConfigError, FileError, merge

from .adapter_file import AdapterFile, check_size, document_bytes, write_parameters
from .deployed_base import UNDER_WAY, share, split
from .external import load_graph
from .matching import WeightSource
from .names import DATA_FILE, GRAPH_FILE
from .options import noted_options
from .task_names import adapter_file, require_new
from .template import GraphTemplate
from .unmerged import adapted_weights, product_of, put_beside
from .write import BoundTensors, Progress

Array = np.ndarray[Any, Any]

ADAPTER_INPUTS = "adapter-inputs"
"""The form's name."""
_A, _B = ".lora_A.weight", ".lora_B.weight"


def write_adapter_inputs(
    template: GraphTemplate,
    source: WeightSource,
    deployment: Path,
    name: str,
    progress: Progress | None = None,
    *,
    adapter: Adapter,
    replace: bool = False,
    document: Mapping[str, Any] | None = None,
) -> int:
    """Add the task `name` to a deployment; return the bytes of its file.

    Args:
        template: the base's graph; it is used up.
        source: the base's weights, without the adapter.
        deployment: a folder with an exported base model in the template's dtype.
        name: letters, digits, `.`, `_` and `-`.
        progress: called with (bytes written, bytes in all), after the comparison with the base.
        adapter: lora_A and lora_B of linear layers of this base.
        replace: whether a task of this name may be there; its file is exchanged in one step.
        document: what the file says of the task, beside the number of its tensors, their bytes and SHA-256.

    Raises:
        ConfigError: `name` cannot be a task's, or the graph is portable or quantised.
        FileError: the task is there, the base is missing, another model or in another dtype, or the disk has
            no room. TargetError: the adapter is more than two matrices beside weights that have one use.
        NonFiniteError: an entry is too large for the graph's dtype.
        The deployment's tasks are as before then.
    """
    path = adapter_file(deployment, name)
    require_new(deployment, name, ADAPTER_INPUTS, replace=replace)
    weights = _plain_weights(template, adapter)
    arrays = {
        key: array
        for layer, weight in weights.items()
        for key, array in _factors(weight, adapter.pairs[layer], template.dtype).items()
    }
    size = check_size(name, arrays)
    tensors = BoundTensors([template], source)
    own, shared = split(template, tensors)
    share([*own, *shared], load_graph(deployment / GRAPH_FILE), deployment, tensors)
    remove_abandoned(deployment / UNDER_WAY)
    require_space(deployment, size + (deployment / GRAPH_FILE).stat().st_size)
    with reported(path), partial_file(deployment / UNDER_WAY) as (temporary, file):
        write_parameters(temporary, arrays)
        told = document_bytes({**(document or {}), **_content(AdapterFile(temporary), arrays)})
        size = file.seek(0, os.SEEK_END) + file.write(told)
        file.flush()
        os.fsync(file.fileno())
        if progress is not None:
            progress(size, size)
        # The graph is exchanged, so that its lock would be one of several files.
        with locked(deployment / DATA_FILE):
            require_new(deployment, name, ADAPTER_INPUTS, replace=replace)
            _add_inputs(deployment / GRAPH_FILE, list(weights.values()))
            os.replace(temporary, path)
            flush_folder(deployment)
    return size


def adapted_layers(graph: ir.Graph) -> tuple[str, ...]:
    """The layers for which a graph has lora_A and lora_B among its inputs; none in any other form."""
    inputs = {str(value.name) for value in graph.inputs}
    return tuple(name.removesuffix(_A) for name in graph.initializers if name in inputs and name.endswith(_A))


def check_form(graph: ir.Model, form: str, deployment: Path) -> None:
    """Raise ConfigError unless a deployment's base can have a task in this form beside it."""
    unmerged = bool(adapted_layers(graph.graph))
    if unmerged is not (form == ADAPTER_INPUTS):
        expected = "a base with" if form == ADAPTER_INPUTS else "a base without"
        raise ConfigError(
            f"form: expected {expected} adapters among its inputs for {form}, got another in {deployment}; "
            "choose another --out"
        )


def adapter_bytes(template: GraphTemplate, adapter: Adapter) -> int:
    """The bytes of the tensors of a task's file.

    Raises ConfigError or TargetError where the adapter cannot be left in the graph.
    """
    _plain_weights(template, adapter)
    return sum(pair.A.size + pair.B.size for pair in adapter.pairs.values()) * template.dtype.itemsize


def _plain_weights(template: GraphTemplate, adapter: Adapter) -> dict[str, str]:
    """For each layer of an adapter its weight in the graph, which must be of onnxruntime's own operators."""
    options = noted_options(template.model, GRAPH_FILE)
    if options.portable or options.quantization is not None:
        got = "a portable graph" if options.portable else options.quantization
        raise ConfigError(
            f"form: expected a graph of onnxruntime's operators and weights that are not quantised for "
            f"{ADAPTER_INPUTS}, got {got}; choose another --form"
        )
    return adapted_weights(template, adapter)


def _factors(weight: str, pair: LoraPair, dtype: np.dtype[Any]) -> dict[str, Array]:
    """A, and B times `scaling`, by the names of their inputs, each entry rounded once.

    Raises NonFiniteError: an entry is too large for the dtype.
    """
    a, b = _input_names(weight)
    # A product with the identity is the factor itself: the merge rounds it, exactly as it rounds weights.
    identity = np.eye(pair.r, dtype=np.float32)
    return {
        a: merge(np.zeros(pair.A.shape, dtype), pair.A, identity, 1.0, name=a),
        b: merge(np.zeros(pair.B.shape, dtype), identity, pair.B, pair.scaling, name=b),
    }


def _input_names(weight: str) -> tuple[str, str]:
    layer = weight.removesuffix(".weight")
    return layer + _A, layer + _B


def _content(written: AdapterFile, arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Number, bytes and SHA-256 of a file's tensors, which must be those that were to be written."""
    digest = hashlib.sha256()
    for name, tensor in written.tensors.items():
        digest.update(tensor.tobytes())
        if name not in arrays or tensor.tobytes() != arrays[name].tobytes():
            raise FileError(f"{written.path}: {name}: expected what was written, got other bytes; try again")
    return {
        "tensors": len(arrays),
        "bytes": sum(array.nbytes for array in arrays.values()),
        "sha256": digest.hexdigest(),
    }


def _add_inputs(path: Path, weights: list[str]) -> None:
    """Let a deployment's graph have A and B beside these weights, and those that it has."""
    model = load_graph(path)
    held = set(adapted_layers(model.graph))
    missing = [weight for weight in weights if weight.removesuffix(".weight") not in held]
    for weight in missing:
        put_inputs(model.graph, weight)
    if missing:
        write_atomic(path, bytes(ir.to_proto(model).SerializeToString()))


def put_inputs(graph: ir.Graph, weight: str) -> None:
    """Put A and B, inputs of rank 0 by default, beside the product of a weight, in place."""
    product = product_of(graph, weight)
    held = graph.initializers[weight]
    assert held.shape is not None
    sizes = [int(size) for size in held.shape.numpy()]
    out, inner = sizes if product.op_type == "FusedMatMul" else reversed(sizes)
    layer, rank = weight.removesuffix(".weight"), f"{weight.removesuffix('.weight')}.r"
    a, b = _input_names(weight)
    values = []
    for name, shape, declared in ((a, (0, inner), [rank, inner]), (b, (out, 0), [out, rank])):
        assert held.dtype is not None
        tensor = ir.tensor(np.zeros(shape, held.dtype.numpy()), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(declared))
        value.const_value = tensor
        graph.register_initializer(value)
        graph.inputs.append(value)
        values.append(value)
    put_beside(product, layer, *values)
