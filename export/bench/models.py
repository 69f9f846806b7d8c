"""The model whose latency is measured: a folder's own, or one of its architecture with random weights.

Timing does not depend on the weights' values, so GPT-2 medium needs no download, and a model can be made with
fewer layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracle.files import Checkpoint
from loracle.files.sidecar import CONFIG_FILE
from loracle.reference import ConfigError, FileError

from ..architecture import check_supported
from ..names import PIXEL_VALUES
from ..tasks import Task

GPT2: Mapping[str, Mapping[str, int]] = {
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
}
"""Models that are known by their sizes."""

_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "layer_rope_theta")
_SEED = 0


@dataclass(frozen=True)
class BenchModel:
    """A checkpoint and what it stands for.

    Attributes:
        name: as the user gave it, without the folders before it.
        folder: of the checkpoint.
        task: what the model is for.
        layers: it has.
        full_layers: of the model that it stands for.
        full_parameters: of that model.
        random: whether its weights are random.
    """

    name: str
    folder: Path
    task: Task
    layers: int
    full_layers: int
    full_parameters: int
    random: bool

    def budget(self, parameters: float) -> float:
        """What is left of an adapter's parameters for as many layers as there are."""
        return parameters * self.layers / self.full_layers


def bench_model(source: str, layers: int | None, scratch: Path) -> BenchModel:
    """Return the model that `source` names: a folder with config.json and safetensors, or a key of `GPT2`.

    Args:
        layers: how many layers the model is to have, with random weights; None for all.
        scratch: where a checkpoint of random weights is written.

    Raises:
        ConfigError: the model has several graphs or no text, or not as many layers.
        FileError: there is no such model.
    """
    if source in GPT2:
        from transformers import GPT2Config

        return _random(source, GPT2Config(**GPT2[source], architectures=["GPT2LMHeadModel"]), layers, scratch)
    folder = Path(source)
    if not folder.is_dir():
        raise FileError(f"{source}: expected a model folder or one of {', '.join(GPT2)}; check --model")
    with Checkpoint(folder) as checkpoint:
        task = _task(checkpoint.config, str(folder / CONFIG_FILE))
        parameters = checkpoint.total_parameters
        config = _config(folder)
        if layers is not None:
            return _random(folder.resolve().name, config, layers, scratch)
    depth = _depth(config)
    return BenchModel(folder.resolve().name, folder, task, depth, depth, parameters, False)


def _task(config: Mapping[str, Any], source: str) -> Task:
    """Return the task of a model that can be measured."""
    task = check_supported(config, source)
    if task.encoded or task.name == "image-classification":
        got = "an encoder and a decoder" if task.encoded else PIXEL_VALUES
        raise ConfigError(f"{source}: expected a model that reads one text in one graph, got {got}")
    return task


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except ValueError as error:  # a model_type that transformers does not know
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"{folder}: {CONFIG_FILE}: transformers refuses it: {reason}") from error


def _depth(config: Any) -> int:
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise ConfigError(
            f"num_hidden_layers: expected a number in {CONFIG_FILE}, got {depth!r}; "
            "this model cannot be measured"
        )
    return depth


def _random(name: str, config: Any, layers: int | None, scratch: Path) -> BenchModel:
    """Write a checkpoint of random weights and return it."""
    import torch
    import transformers
    from accelerate import init_empty_weights

    from loracle.torch_impl.loading import quiet_transformers

    task = _task(config.to_dict(), name)
    build = getattr(transformers, task.auto)
    with init_empty_weights():
        empty = build.from_config(config)
    empty.tie_weights()
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    depth = _depth(config)
    kept = depth if layers is None else layers
    if not 1 <= kept <= depth:
        raise ConfigError(f"layers: expected 1 to {depth}, as {name} has, got {kept}")
    config.num_hidden_layers = kept
    for key in _PER_LAYER:
        values = getattr(config, key, None)
        if isinstance(values, list | tuple) and len(values) == depth:
            setattr(config, key, values[:kept])
    folder = scratch / "checkpoint"
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        build.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return BenchModel(name, folder, task, kept, depth, parameters, True)
