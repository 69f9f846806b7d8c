"""A transformers model without its weights: the right graph, shapes and dtypes, hardly any storage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from .operators import ATTENTION, register_attention


@dataclass(frozen=True)
class WeightlessModel:
    """`model`, and for each parameter every name it goes by (more than one where weights are tied)."""

    model: nn.Module
    config: Any
    aliases: dict[str, tuple[str, ...]]


def build_weightless(model_dir: Path, dtype: torch.dtype) -> WeightlessModel:
    """The causal language model that `model_dir/config.json` describes, with stand-ins for its weights.

    Each parameter is a stride-0 view of a single zero on the CPU: the exporter wants CPU tensors, and
    tracing reads shapes alone. Buffers hold their real values.
    """
    register_attention()
    config = AutoConfig.from_pretrained(model_dir)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    model.tie_weights()
    model.eval()
    stand_ins: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # holds the originals: ids stay unique
    names: dict[int, list[str]] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        key = id(parameter)
        if key not in stand_ins:
            zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            stand_ins[key] = (parameter, nn.Parameter(zero, requires_grad=False))
        names.setdefault(key, []).append(name)
    for key, (_, stand_in) in stand_ins.items():
        for name in names[key]:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._parameters[leaf] = stand_in
    return WeightlessModel(model, config, {group[0]: tuple(group) for group in names.values()})
