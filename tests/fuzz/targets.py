"""What is fuzzed: for each reader valid files, how they are changed, and a call that uses what it returns."""

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.export.adapter_file import AdapterFile
from loracle.export.deployed_tasks import deployed_tasks, manifest
from loracle.export.external import load_graph
from loracle.export.linked import own_data
from loracle.export.loaded_task import map_task
from loracle.export.options import noted_options
from loracle.export.task_document import parse_document
from loracle.export.text import TextModel
from loracle.export.verification.candidate import open_candidate
from loracle.export.verification.graph_diff import first_difference
from loracle.export.verification.graph_tensors import held_tensors
from loracle.export.verified import read_verified
from loracle.files import (
    Checkpoint,
    LoraConfig,
    MergedWeights,
    adapter_from_litgpt,
    adapter_from_loralib,
    read_adapter,
)
from loracle.files.head_config import read_head
from loracle.files.json_file import parse_json_object, read_json_object
from loracle.files.safetensors_file import SafetensorsFile

from . import seeds
from .bytes_mutators import mutate_bytes
from .file_mutators import mutate_onnx, mutate_pickled, mutate_safetensors
from .json_mutators import mutate_json

Mutate = Callable[[random.Random, bytes], bytes]

_BY_SUFFIX: Mapping[str, Mutate] = {
    ".json": mutate_json,
    ".safetensors": mutate_safetensors,
    ".onnx": mutate_onnx,
    ".pt": mutate_pickled,
}

_WEIGHTS = {".onnx": 5}
"""How often files of a kind are chosen, beside others; what is beside a graph has targets of its own."""


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        seeds: makes its valid files.
        read: reads the files in a folder, and uses what comes.
        share: of the executions of a long run, beside the others'.
    """

    seeds: Callable[[], Sequence[seeds.Files]]
    read: Callable[[Path], object]
    share: int


@cache
def seeds_of(name: str) -> Sequence[seeds.Files]:
    """Return the valid files of a target."""
    return TARGETS[name].seeds()


def mutated(name: str, rng: random.Random) -> dict[str, bytes]:
    """Return the files of a target with one of them changed; or rarely two, or one missing."""
    files = dict(rng.choice(seeds_of(name)))
    for _ in range(1 if rng.random() < 0.9 else 2):
        own = rng.choice([name for name in files for _ in range(_WEIGHTS.get(Path(name).suffix, 1))])
        if rng.random() < 0.01 and len(files) > 1:
            del files[own]
        else:
            files[own] = _BY_SUFFIX.get(Path(own).suffix, mutate_bytes)(rng, files[own])
    return files


def _read_json(folder: Path) -> None:
    repr(read_json_object(folder / "x.json")).encode()


def _read_safetensors(folder: Path) -> None:
    path = folder / "x.safetensors"
    file = SafetensorsFile(path)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = parse_json_object(content[8:end], "header")
    assert file.entries.keys() == header.keys() - {"__metadata__"}
    for name, entry in file.entries.items():
        first, last = header[name]["data_offsets"]
        tensor = file.tensor(name)
        assert list(tensor.shape) == header[name]["shape"] == list(entry.shape)
        assert tensor.tobytes() == content[end + first : end + last]
        file.release(name)
    file.fingerprint()


def _read_checkpoint(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        weights = MergedWeights(checkpoint, None, threads=1)
        for name in weights.names:
            weights.tensor(name, None).tobytes()
        assert checkpoint.total_bytes >= 0
        assert checkpoint.tied in (True, False)


@cache
def _base() -> Checkpoint:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in seeds.checkpoint()[1].items():
            Path(folder, name).write_bytes(content)
        return Checkpoint(folder)  # what is mapped stays, whatever becomes of the files


def _read_adapter(folder: Path) -> None:
    read_adapter(folder)


def _merge(folder: Path) -> None:
    weights = MergedWeights(_base(), read_adapter(folder), threads=1)
    for name in weights.merged_names:
        assert np.isfinite(weights.tensor(name, None)).all()


_PATHS = (seeds.Q, seeds.V, "model.embed_tokens", "lm_head", "a." * 60, f"model.layers.{'1' * 6000}.q_proj")


def _read_config(folder: Path) -> None:
    config = LoraConfig.from_json(read_json_object(folder / "adapter_config.json"))
    for path in _PATHS:
        config.targets(path)
        config.targets_parameter(path)
        config.saves(path)
        config.token_indices_of(path)
        assert np.isfinite(config.scaling_of(path))
    if not config.names_attention:
        assert LoraConfig.from_json(config.to_json()) == config


def _read_head(folder: Path) -> None:
    read_head(folder, {})


def _read_document(folder: Path) -> None:
    read_verified(folder, "x", "f" * 64)
    text = (folder / "x.json").read_bytes() if (folder / "x.json").exists() else b"{}"
    parse_document(text.decode("utf-8", "surrogateescape"), "document").to_json()


def _read_parameters(folder: Path) -> None:
    file = AdapterFile(folder / "x.onnx_adapter")
    for tensor in file.tensors.values():
        tensor.tobytes()


def _map_task(folder: Path) -> None:
    path = folder / "x.task.safetensors"
    loaded = map_task(path if path.exists() else folder / "x.onnx_adapter", (), "cpu")
    for value in loaded.weights.values():
        value.numpy()


@cache
def _graph() -> ir.Model:
    model = ir.serde.deserialize_model(seeds.graph())
    model.functions.clear()
    return model


def _read_graph(folder: Path) -> None:
    path = folder / "model.onnx"
    model = load_graph(path)
    for held in held_tensors(model.graph).values():
        held.read(lambda tensor: tensor.copy())
    other = load_graph(path)
    other.functions.clear()  # else they are the difference
    first_difference(other, _graph(), frozenset({"far", "words"}))
    own_data(model)
    noted_options(model, str(path))
    candidate = open_candidate(folder, ["model.onnx"])
    for name in model.graph.initializers:
        candidate.tensor(name)
        assert candidate.is_shared("model.onnx", name)


def _read_deployment(folder: Path) -> None:
    for task in deployed_tasks(folder):
        task.to_json()
    manifest(folder)


def _read_tokenizer(folder: Path) -> None:
    text = TextModel(folder)
    tokens = text.encode("abc Aéx <s> \U0001f600 ab")
    text.encoding("a", "b")
    text.decode(tokens)
    answer = text.answer(["x"])
    for token in (*tokens, 0, 10**6):
        answer.push(token)
    text.stop_rules(["</s>", "y"])
    if text.has_chat_template:
        text.encode_prompt("abc", system="b")


def _read_state(folder: Path) -> None:
    from loracle.torch_impl.state_file import read_state_dict

    state = read_state_dict(folder / "x.pt", inside="model")
    if any(name.startswith("transformer.") for name in state):
        adapter_from_litgpt(state, lora_r=2, lora_alpha=4, n_head=2, n_query_groups=1, head_size=2)
    else:
        adapter_from_loralib(state, r=2, lora_alpha=4)


def _configs() -> list[seeds.Files]:
    return [{"adapter_config.json": files["adapter_config.json"]} for files in seeds.adapter()]


TARGETS: Mapping[str, Target] = {
    "json": Target(seeds.json_documents, _read_json, 20),
    "safetensors": Target(seeds.safetensors, _read_safetensors, 25),
    "checkpoint": Target(seeds.checkpoint, _read_checkpoint, 8),
    "config": Target(_configs, _read_config, 12),
    "adapter": Target(seeds.adapter, _read_adapter, 10),
    "merge": Target(seeds.adapter, _merge, 5),
    "head": Target(seeds.heads, _read_head, 8),
    "document": Target(seeds.documents, _read_document, 10),
    "parameters": Target(seeds.parameters, _read_parameters, 15),
    "task": Target(lambda: [*seeds.task(), *seeds.parameters()], _map_task, 6),
    "graph": Target(seeds.model, _read_graph, 6),
    "deployment": Target(seeds.deployments, _read_deployment, 2),
    "tokenizer": Target(seeds.tokenizers, _read_tokenizer, 3),
    "state": Target(seeds.states, _read_state, 3),
}


def read(name: str, folder: Path) -> Any:
    """Read the files of a target in a folder."""
    return TARGETS[name].read(folder)
