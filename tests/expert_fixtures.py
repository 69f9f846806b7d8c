"""A mixture of experts in both forms: checkpoints and adapters with its experts stacked, and apart."""

import re
from dataclasses import replace
from pathlib import Path
from shutil import copytree, ignore_patterns

import numpy as np
from files_fixtures import Array, random_array

from loracle.files import Adapter, Checkpoint, LoraConfig, LoraPair
from loracle.files.safetensors_writer import write_safetensors

R, ALPHA = 3, 6
#: model_type: the module of experts in checkpoints that have them apart, and an expert's modules.
OWN_NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def stacked_checkpoint(apart: Path, folder: Path, kind: str) -> Path:
    """The checkpoint in `apart` with stacked experts, as transformers' model has them."""
    module, (gate, up, down) = OWN_NAMES[kind]
    copytree(apart, folder, ignore=ignore_patterns("*.safetensors"))
    with Checkpoint(apart) as checkpoint:
        tensors = {name.replace(f".{module}.", ".mlp."): checkpoint.tensor(name) for name in checkpoint.names}
    held: dict[str, Array] = {name: array for name, array in tensors.items() if ".experts." not in name}
    assert len(held) < len(tensors), "the checkpoint has experts apart"
    paths = {match[1] for name in tensors if (match := re.match(r"(.+\.experts)\.\d+\.", name))}
    for path in paths:
        count = sum(name.startswith(f"{path}.") and name.endswith(f".{gate}.weight") for name in tensors)

        def own(part: str, path: str = path, count: int = count) -> Array:
            return np.stack([tensors[f"{path}.{e}.{part}.weight"] for e in range(count)])

        held[f"{path}.gate_up_proj"] = np.concatenate([own(gate), own(up)], 1)
        held[f"{path}.down_proj"] = own(down)
    write_safetensors(folder / "model.safetensors", held, {"format": "pt"})
    return folder


def adapter_apart(kind: str, layers: int, experts: int, hidden: int, inner: int) -> Adapter:
    """An adapter of all modules of all experts, and of the routers."""
    module, (gate, up, down) = OWN_NAMES[kind]
    shapes = {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=(*shapes, "gate"))
    arrays = {
        f"model.layers.{layer}.{module}.experts.{e}.{part}": (
            0.1 * random_array((R, columns), 1000 * layer + 10 * e + number),
            0.1 * random_array((rows, R), 1000 * layer + 10 * e + number + 5),
        )
        for layer in range(layers)
        for e in range(experts)
        for number, (part, (rows, columns)) in enumerate(shapes.items())
    }
    arrays |= {
        f"model.layers.{layer}.{module}.gate": (
            0.1 * random_array((R, hidden), 7 + layer),
            0.1 * random_array((experts, R), 9 + layer),
        )
        for layer in range(layers)
    }
    return Adapter.from_arrays(config, arrays)


def adapter_stacked(kind: str, apart: Adapter, layers: int, experts: int) -> Adapter:
    """The same adapter as one of stacked parameters: both updates of the shared rows side by side."""
    module, (gate, up, down) = OWN_NAMES[kind]
    pairs: dict[str, LoraPair] = {}
    for layer in range(layers):
        own = f"model.layers.{layer}.{module}.experts"
        path = f"model.layers.{layer}.mlp.experts"
        factors = []
        for e in range(experts):
            one, two = (apart.pairs[f"{own}.{e}.{part}"] for part in (gate, up))
            zero = np.zeros_like(one.B)
            factors.append((np.vstack([one.A, two.A]), np.block([[one.B, zero], [zero, two.B]])))
        pairs[f"{path}.gate_up_proj"] = _parameter(factors)
        pairs[f"{path}.down_proj"] = _parameter(
            [(pair.A, pair.B) for pair in (apart.pairs[f"{own}.{e}.{down}"] for e in range(experts))]
        )
        router = apart.pairs[f"model.layers.{layer}.{module}.gate"]
        pairs[f"model.layers.{layer}.mlp.gate.weight"] = replace(router, kind="parameter")
    config = replace(
        apart.config,
        target_modules=None,
        target_parameters=("experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"),
        rank_pattern={"experts.gate_up_proj": 2 * R},
        alpha_pattern={"experts.gate_up_proj": 2 * ALPHA},
    )
    return Adapter(config, pairs)


def _parameter(factors: list[tuple[Array, Array]]) -> LoraPair:
    """PEFT's layout: the rows of an expert's A together, the experts of a column of B together."""
    A = np.concatenate([A for A, _ in factors])
    B = np.stack([B for _, B in factors], 2)
    return LoraPair(A, B.reshape(len(B), -1), ALPHA / R, "parameter")
