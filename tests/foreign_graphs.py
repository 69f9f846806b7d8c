"""Tiny models exported by others than loracle, as folders on disk, and small graphs made by hand."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers as hf
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from benchmarks.peers import OFFLINE, genai_builder
from benchmarks.torch_export import export_decoder


def genai_export(checkpoint: Path, out: Path, precision: str = "fp32") -> Path:
    """What onnxruntime-genai's builder makes of a checkpoint, for the CPU; the graph."""
    command = genai_builder(checkpoint, out, out.parent / "cache", precision)
    subprocess.run(command, env={**os.environ, **OFFLINE}, check=True, capture_output=True)
    return out / "model.onnx"


def torch_export(checkpoint: Path, out: Path, *, cache: bool = True, dtype: str = "float32") -> Path:
    """What `torch.onnx.export` makes of a decoder, with a cache as plain tensors or without one; the
    graph."""
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    out.mkdir(parents=True)
    path = out / "model.onnx"
    with torch.no_grad(), _quietly():
        if cache:
            export_decoder(model, path)
            return path
        torch.onnx.export(
            _Answers(model).eval(),
            (torch.zeros((2, 3), dtype=torch.int64),),
            str(path),
            dynamo=True,
            external_data=True,
            input_names=["ids"],
            output_names=["answers"],
            dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")},),
        )
    return path


def torch_export_encoder(checkpoint: Path, auto: str, out: Path, *, length: int | None = None) -> Path:
    """What `torch.onnx.export` makes of an encoder: with open axes; or for one text of one length, without a
    mask."""
    model = getattr(hf, auto).from_pretrained(checkpoint, dtype=torch.float32).eval()
    out.mkdir(parents=True)
    path = out / "model.onnx"
    ids = torch.zeros((1 if length else 2, length or 5), dtype=torch.int64)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    given, names = (ids,), ["input_ids"]
    if length is None:
        given, names = (ids, torch.ones_like(ids)), ["input_ids", "attention_mask"]
    with torch.no_grad(), _quietly():
        torch.onnx.export(
            _Answers(model).eval(),
            given,
            str(path),
            dynamo=True,
            external_data=True,
            input_names=names,
            output_names=["logits"],
            dynamic_shapes=None if length else tuple({0: batch, 1: sequence} for _ in names),
        )
    return path


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter prints, and warns of the axes' names."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Answers(nn.Module):
    """A model's logits alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.options: dict[str, Any] = {"use_cache": False} if model.config.model_type == "llama" else {}

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        answer: Tensor = self.model(input_ids=ids, attention_mask=mask, **self.options).logits
        return answer


TOKENS = 6


def looked_up(
    path: Path,
    *,
    width: int | str = "sequence",
    rows: int | str = "batch",
    past: Sequence[int | str] = (),
    last: bool = False,
    masked: bool = False,
    named: Mapping[str, str] | None = None,
) -> np.ndarray[Any, Any]:
    """Write a graph whose logits for a token are a row of a table, which is returned, and the sum of what is
    cached; the cache holds the tokens' numbers.

    Args:
        width, rows: of the tokens, fixed or a symbol.
        past: axes of the cache, of which the third grows; none without one.
        last: whether there are logits of the last position alone.
        masked: whether there is a mask, whose sum over a row is added.
        named: other names of inputs and outputs.
    """
    table = np.arange(TOKENS * TOKENS, dtype=np.float32).reshape(TOKENS, TOKENS)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["rows"])]
    logits, total = "rows", ["batch", "total", TOKENS]
    constants = [numpy_helper.from_array(table, "table")]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [rows, width])]
    outputs = []
    if past:
        constants.append(numpy_helper.from_array(np.array([0, 1, -1, 1], np.int64), "shape"))
        nodes += [
            helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["numbers", "shape"], ["new"]),
            helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
            helper.make_node("ReduceSum", ["present.0.key"], ["sum"], keepdims=0),
            helper.make_node("Add", [logits, "sum"], ["summed"]),
        ]
        logits = "summed"
        inputs.append(helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, past))
        outputs.append(
            helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, ["batch", 1, "now", 1])
        )
    if masked:
        constants.append(numpy_helper.from_array(np.array([1], np.int64), "columns"))
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["counted"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["counted", "columns"], ["count"], keepdims=1),
            helper.make_node("Unsqueeze", ["count", "columns"], ["counts"]),
            helper.make_node("Add", [logits, "counts"], ["counted_rows"]),
        ]
        logits = "counted_rows"
        inputs.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [rows, width]))
    if last:
        constants += [
            numpy_helper.from_array(np.array([value], np.int64), name)
            for name, value in (("start", -1), ("end", 2**62), ("axis", 1))
        ]
        nodes.append(helper.make_node("Slice", [logits, "start", "end", "axis"], ["sliced"]))
        logits = "sliced"
    nodes.append(helper.make_node("Identity", [logits], ["logits"]))
    outputs.insert(0, helper.make_tensor_value_info("logits", TensorProto.FLOAT, total))
    graph = helper.make_graph(nodes, "looked up", inputs, outputs, constants)
    for old, new in (named or {}).items():
        for value in (*graph.input, *graph.output):
            value.name = new if value.name == old else value.name
        for node in graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(path))
    return table
