"""A transformers model without its weights: the right graph, shapes and dtypes, hardly any storage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from .attention import ATTENTION, register_attention
from .tasks import Task


@dataclass(frozen=True)
class WeightlessModel:
    """`model`, for each parameter every name it goes by (more than one where weights are tied), and how
    names of older checkpoints become the model's."""

    model: nn.Module
    config: Any
    aliases: dict[str, tuple[str, ...]]
    renames: tuple[tuple[str, str], ...]


def build_weightless(model_dir: Path, task: Task, dtype: torch.dtype) -> WeightlessModel:
    """The model of a task that `model_dir/config.json` describes, with stand-ins for its weights.

    Each parameter is a stride-0 view of a single zero on the CPU: the exporter wants CPU tensors, and
    tracing reads shapes alone. Buffers hold their real values.
    """
    register_attention()
    config = transformers.AutoConfig.from_pretrained(model_dir)
    build = getattr(transformers, task.auto)
    with init_empty_weights(include_buffers=False):
        model = build.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
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
    renames = tuple(
        (pattern, transform.target_patterns[0])
        for transform in get_model_conversion_mapping(model)
        if type(transform) is WeightRenaming and len(transform.target_patterns) == 1
        for pattern in transform.source_patterns
    )
    aliases = {group[0]: tuple(group) for group in names.values()}
    # A buffer that is saved with the weights is one of them.
    saved = model.state_dict().keys()
    aliases |= {
        name: (name,)
        for name, buffer in model.named_buffers()
        if name in saved and buffer.is_floating_point()
    }
    return WeightlessModel(model, config, aliases, renames)
