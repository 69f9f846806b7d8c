"""What the tests of `loracle bench` share: models, their graphs, and the same adapters in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from architectures import CASES, VOCABULARY, make
from torch import Tensor
from torch.nn import functional
from truth_cases import TASK, truth_of

from loracle.export.bench import graphs as bench_graphs
from loracle.export.bench.graphs import Graphs, MethodGraph, Positions
from loracle.export.bench.models import BenchModel
from loracle.export.bench.places import ATTENTION, MLP
from loracle.export.bench.runner import Runner, open_method
from loracle.export.bench.settings import Setting
from loracle.export.external import load_graph
from loracle.export.verification.truth import Float64Model, Truth

Array = np.ndarray[Any, Any]
FLOAT32 = np.dtype(np.float32)
SETTING = Setting(2, 7, 4000)
POSITIONS = Positions(3, 2)

#: Modules whose results are added to the stream, by the ends of their paths.
PARTS = {
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "bert": ("attention.output.dense", "output.dense"),
    "bert_sequence": ("attention.output.dense", "output.dense"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "opt": ("self_attn.out_proj", "fc2"),
    "qwen3": ("self_attn.o_proj", "mlp.down_proj"),
    "phi3": ("self_attn.o_proj", "mlp.down_proj"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
}


@dataclass
class Case:
    """A model of tests/architectures.py and its graphs."""

    name: str
    folder: Path
    graphs: Graphs

    def run(self, graph: MethodGraph, setting: Setting = SETTING) -> tuple[Array, Array, Runner]:
        """The tokens, the only output of a prefill, and what ran it."""
        runner = Runner(graph, open_method(graph, "cpu", 1), setting, VOCABULARY, "cpu")
        (output,) = runner.prefill().values()
        return runner.tokens, output, runner

    def truth(self) -> Float64Model:
        return truth_of(self.folder, None, self.name)


def cases(root: Path, patch: Any, dtype: str = "fp32") -> Callable[[str], Case]:
    """What makes a case under `root`, once. Adapters are large: they change every output."""
    patch.setattr(bench_graphs, "_SPREAD", 0.3)
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            folder = make(root / name, name)
            config = CASES[name].config()
            layers = config.num_hidden_layers
            model = BenchModel(name, folder, TASK[CASES[name].task], layers, layers, 1, False)
            (root / f"{name}-graphs").mkdir()
            made[name] = Case(name, folder, Graphs(model, root / f"{name}-graphs", POSITIONS, dtype))
        return made[name]

    return case


def parameters_of(graph: MethodGraph) -> dict[str, Tensor]:
    """An adapter's tensors in a graph, by their names, in float64."""
    found = load_graph(graph.graph).graph.initializers
    return {
        name: torch.from_numpy(tensor_of(value)).double()
        for name, value in found.items()
        if ".adapter." in name or name.startswith("prompt.")
    }


def tensor_of(value: ir.Value) -> Array:
    assert value.const_value is not None
    return np.array(value.const_value.numpy())


def put_adapters(model: torch.nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Compute `h + W_up f(W_down h + b) + b'` in the place of the results of a model's parts."""
    layers = {ATTENTION: 0, MLP: 0}
    for path, module in model.named_modules():
        if not path.endswith(PARTS[name]):
            continue
        part = ATTENTION if path.endswith(PARTS[name][0]) else MLP
        prefix = f"layers.{layers[part]}.{part}.adapter."
        layers[part] += 1
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        if own:
            module.register_forward_hook(adapter_hook(own))
    assert layers[ATTENTION] == layers[MLP] > 0


def adapter_hook(own: Mapping[str, Tensor]) -> Callable[..., Any]:
    def hook(_: Any, __: Any, h: Tensor) -> Tensor:
        x = h
        if "norm.weight" in own:
            x = functional.layer_norm(h, h.shape[-1:], own["norm.weight"], own["norm.bias"], 1e-5)
        inner = x @ own["down.weight"].T + own["down.bias"]
        inner = torch.relu(inner) if "norm.weight" in own else functional.gelu(inner)
        return h + inner @ own["up.weight"].T + own["up.bias"]

    return hook


def feeds_of(tokens: Array) -> dict[str, Array]:
    return {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}


def ratio_of(got: Array, truth: Truth) -> float:
    """The largest error over its tolerance."""
    return float(np.abs(got - truth.logits).max()) / truth.tolerance
