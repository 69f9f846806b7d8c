"""Put `LoraLinear` layers in place of a model's linear layers, and take them out again."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from loracle.files import LoraConfig
from loracle.reference import ConfigError, TargetError

from .layers import LoraLinear

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""What the shorthand ``"attention"`` stands for: the projections of the LoRA paper, section 4.2."""

DEFAULT_TARGETS = ("q_proj", "v_proj")
"""The targets when none are named: query and value, the paper's choice (section 7.1)."""

_CONFIG = "loracle_config"


def inject(
    model: nn.Module, config: LoraConfig, *, generator: torch.Generator | None = None
) -> tuple[str, ...]:
    """Wrap every targeted ``nn.Linear`` of ``model`` in a `LoraLinear` and freeze all other parameters.

    ``config.target_modules`` has PEFT's meaning: a tuple of names (a module's whole path or its end), a
    regular expression that matches the whole path, or ``"all-linear"`` (every linear layer but the output
    embedding). Beyond PEFT, ``"attention"`` is `ATTENTION` and None is `DEFAULT_TARGETS`. The configuration
    kept with the model (`injected_config`) has these resolved to names, so that PEFT understands it.

    Args:
        model: changed in place; untouched when an error is raised.
        config: rank, alpha, dropout and targets; the patterns apply by path.
        generator: where each ``lora_A`` is drawn from, in the order of the paths; torch's global one when
            None.

    Returns:
        The paths of the wrapped layers, in the model's order.

    Raises:
        TargetError: nothing matches (the candidates are listed), a match is not an ``nn.Linear`` of its own
            (another type, a shared module, a tied weight, inside ``nn.MultiheadAttention``), or the model
            has adapters already.
    """
    config, paths = resolve_targets(model, config)
    layers = {}
    for path in paths:
        base = model.get_submodule(path)
        assert isinstance(base, nn.Linear), path
        layers[path] = LoraLinear(
            base,
            config.rank_of(path),
            config.alpha_of(path),
            dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            generator=generator,
        )
    model.requires_grad_(False)
    for path, layer in layers.items():
        _replace(model, path, layer)
    setattr(model, _CONFIG, config)
    return paths


def parse_targets(text: str) -> tuple[str, ...] | str:
    """Return the ``target_modules`` that a comma-separated list of names, or one of the shorthands, stands
    for.

    Raises:
        ConfigError: no name is given.
    """
    if text in ("attention", "all-linear"):
        return text
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ConfigError(
            f"targets: expected names of linear layers, got {text!r}; name some, or say all-linear"
        )
    return names


def resolve_targets(model: nn.Module, config: LoraConfig) -> tuple[LoraConfig, tuple[str, ...]]:
    """Return ``config`` with its shorthand resolved, and the paths that `inject` would wrap; see there."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if isinstance(module, LoraLinear):
            raise TargetError(f"{path}: expected a model without adapters, got a LoraLinear; eject() first")
    if config.target_modules is None:
        config = replace(config, target_modules=DEFAULT_TARGETS)
    elif config.target_modules == "attention":
        config = replace(config, target_modules=ATTENTION)
    elif config.names_all_linear:
        config = _every_linear(model, config, modules)
    paths = tuple(path for path in modules if path and config.targets(path))
    if not paths:
        raise TargetError(
            f"target_modules: expected the name of a linear layer, got {_shown(config.target_modules)}, "
            f"which no module matches; candidates: {_candidates(modules) or 'none, no layer is linear'}"
        )
    _check_each(paths, modules)
    return config, paths


def eject(model: nn.Module) -> tuple[str, ...]:
    """Put every base layer back as it was before `inject` and return their paths.

    A merged layer is unmerged first (`loracle.torch_impl.merge` and then nothing else is how to keep a
    merge). The parameters stay frozen.
    """
    layers = lora_layers(model)
    for path, layer in layers.items():
        layer.restore_base_weight()
        _replace(model, path, layer.base_layer)
    if hasattr(model, _CONFIG):
        delattr(model, _CONFIG)
    return tuple(layers)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the model's `LoraLinear` layers by path, in the model's order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def injected_config(model: nn.Module) -> LoraConfig:
    """Return the configuration that `inject` or `load_adapter` kept, its targets resolved to names.

    Raises:
        TargetError: the model has no adapters.
    """
    config = getattr(model, _CONFIG, None)
    if not isinstance(config, LoraConfig):
        raise TargetError(f"{type(model).__name__}: expected a model with adapters, got none; inject() first")
    return config


def output_embedding(model: nn.Module) -> nn.Module | None:
    """Return the layer that maps hidden states to logits, where the model has transformers' getter for it."""
    getter = getattr(model, "get_output_embeddings", None)
    module = getter() if callable(getter) else None
    return module if isinstance(module, nn.Module) else None


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _every_linear(model: nn.Module, config: LoraConfig, modules: Mapping[str, nn.Module]) -> LoraConfig:
    """Name every linear layer but the output's: by last components where they suffice, else by path."""
    output = output_embedding(model)
    paths = tuple(
        path
        for path, module in modules.items()
        if module is not output and _is_plain_linear(module, path, modules) and config.targets(path)
    )
    named = replace(config, target_modules=tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths)))
    if {path for path in modules if path and named.targets(path)} == set(paths):
        return named
    return replace(config, target_modules=paths)


def _is_plain_linear(module: nn.Module, path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether calling the module, and nothing else, is what computes ``x W^T + b``."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        # MultiheadAttention reads out_proj.weight and never calls the module.
        and not isinstance(modules[path.rpartition(".")[0]], nn.MultiheadAttention)
    )


def _check_each(paths: Iterable[str], modules: Mapping[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = defaultdict(list)
    for path, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(path)
    for path in paths:
        module = modules[path]
        if not isinstance(module, nn.Linear) or not _is_plain_linear(module, path, modules):
            raise TargetError(
                f"{path}: expected an nn.Linear that the model calls, got {type(module).__name__}; "
                f"name linear layers, candidates: {_candidates(modules)}"
            )
        others = [owner for owner in owners[id(module.weight)] if owner != path]
        if others:
            raise TargetError(
                f"{path}.weight: expected a weight of its own, got one tied to {others[0]}; "
                "a merge would change both: leave it out of the targets"
            )


def _candidates(modules: Mapping[str, nn.Module]) -> str:
    counts: dict[str, int] = defaultdict(int)
    for path, module in modules.items():
        if path and _is_plain_linear(module, path, modules):
            counts[path.rpartition(".")[2]] += 1
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def _shown(targets: tuple[str, ...] | str | None) -> str:
    return ", ".join(map(repr, targets)) if isinstance(targets, tuple) else repr(targets)
