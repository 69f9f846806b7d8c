"""What of a checkpoint can have a low-rank update: the weights of linear layers, by names and shapes."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from loracle.files import Checkpoint
from loracle.files.architectures import architecture_of
from loracle.files.checkpoint import OUTPUT_EMBEDDINGS, is_module
from loracle.files.lora_pair import FLOATS

_WEIGHT = ".weight"
# a component that is an embedding's; embed_out is an output layer
_EMBEDDING = re.compile(r".*embed(?!_out).*|wte|wpe|shared|relative_attention_bias", re.IGNORECASE)
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")


def stores_turned(config: Mapping[str, Any]) -> bool:
    """Tell whether the model's linear layers are transformers' ``Conv1D``, whose weights are (in, out)."""
    return config.get("model_type") in _CONV1D_MODELS


def why_not_low_rank(checkpoint: Checkpoint, name: str) -> str | None:
    """Return what a tensor is that gets no low-rank update; None for the weight of a linear layer."""
    shape, module = checkpoint.shape(name), name.rpartition(".")[0]
    last = module.rpartition(".")[2]
    if checkpoint.dtype(name) not in FLOATS:
        return f"of dtype {checkpoint.dtype(name)}"
    if len(shape) != 2:
        return f"{len(shape)} axes"
    if not name.endswith(_WEIGHT):
        return "no module's weight"
    if _EMBEDDING.fullmatch(last):
        return "an embedding"
    if checkpoint.tied and is_module(name, OUTPUT_EMBEDDINGS):
        return "tied to the embedding"
    if stores_turned(checkpoint.config) and last not in _CONV1D:
        return "beside layers whose weights are stored (in, out)"
    architecture = architecture_of(checkpoint.config)
    if architecture is not None and architecture.experts and last in ("gate", "router"):
        return "a router"
    return None


def module_of(name: str) -> str:
    """Return the path of the module that a tensor is of."""
    return name.rpartition(".")[0]


def names_for(selected: Collection[str], others: Collection[str]) -> tuple[str, ...]:
    """Return names for modules, as ``target_modules`` has them, that name none of the other modules.

    A last component stands for all modules that end in it, where no other one does; else it is a whole path.
    """
    ends = {path.rpartition(".")[2] for path in others}
    names = {path.rpartition(".")[2] if path.rpartition(".")[2] not in ends else path for path in selected}
    return tuple(sorted(names))
