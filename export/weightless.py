"""A transformers model without its weights: the right graph, shapes and dtypes, hardly any storage."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from loracle.reference import ConfigError

from .attention import ATTENTION, register_attention
from .plain_attention import MODELS_OWN, PLAIN_ATTENTION, register_plain_attention
from .tasks import Task


@dataclass(frozen=True)
class WeightlessModel:
    """`model`, for each parameter every name it goes by (more than one where weights are tied), how names of
    older checkpoints become the model's, and whether its attention is in standard operators."""

    model: nn.Module
    config: Any
    aliases: dict[str, tuple[str, ...]]
    renames: tuple[tuple[str, str], ...]
    portable: bool = False


def has_attention_interface(model_dir: Path, task: Task, *, trusted: bool = False) -> bool:
    """Whether the modelling code of what `model_dir/config.json` describes lets attention be given to it."""
    config = _config(model_dir, trusted)
    auto = getattr(transformers, task.auto)
    own_code = getattr(config, "auto_map", None) or {}
    if trusted and task.auto in own_code:
        found = get_class_from_dynamic_module(own_code[task.auto], str(model_dir), local_files_only=True)
    elif type(config) in auto._model_mapping:
        found = auto._model_mapping[type(config)]
    else:
        raise ConfigError(
            f"{model_dir}: model_type: expected one that transformers has for {task.name}, "
            f"got {config.model_type!r}"
        )
    classes = found if isinstance(found, tuple) else (found,)
    return all("ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[own.__module__]) for own in classes)


def _config(model_dir: Path, trusted: bool) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(
            model_dir, trust_remote_code=trusted, local_files_only=True
        )
    except ValueError as error:  # a model_type that transformers does not know
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"{model_dir}: config.json: transformers refuses it: {reason}") from error


def build_weightless(
    model_dir: Path, task: Task, dtype: torch.dtype, *, portable: bool = False, trusted: bool = False
) -> WeightlessModel:
    """The model of a task that `model_dir/config.json` describes, with stand-ins for its weights.

    Each parameter is a stride-0 view of a single zero on the CPU: the exporter wants CPU tensors, and
    tracing reads shapes alone. Buffers hold their real values.

    Args:
        portable: whether attention is to be in standard operators.
        trusted: whether the folder's own modelling code may run.
    """
    register_attention()
    register_plain_attention()
    attention = ATTENTION
    if portable:
        given = has_attention_interface(model_dir, task, trusted=trusted)
        attention = PLAIN_ATTENTION if given else MODELS_OWN
    config = _config(model_dir, trusted)
    build = getattr(transformers, task.auto)
    with init_empty_weights(include_buffers=False):
        model = build.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trusted
        )
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
    return WeightlessModel(model, config, aliases, renames, portable)
