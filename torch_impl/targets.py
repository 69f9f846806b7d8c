"""Which of a model's modules and parameters a configuration speaks of."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loracle.files import LoraConfig
from loracle.files.matching import matches
from loracle.reference import ConfigError, TargetError

from .architectures import attention_targets, default_targets
from .heads import with_head
from .layer import LoraLayer
from .module_tree import base_modules
from .parameters import parameter_shapes
from .quantization import is_quantized
from .ties import tied_targets, token_targets

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Targets:
    """What an adapter gets to do in a model.

    Attributes:
        config: with shorthands resolved to names, so that PEFT understands it.
        modules: paths of the modules to adapt, in the model's order; after a MultiheadAttention its out_proj.
        parameters: full names of the stacked parameters to adapt, in the model's order.
        tied: path of a module that shares the weight of an embedding to adapt, to that one's path; the one
            update counts in both.
        tokens: path of an embedding or output layer to the tokens whose rows are trained.
        tied_tokens: path of a module that shares the weight of one of these, to that one's path.
    """

    config: LoraConfig
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    tied: Mapping[str, str]
    tokens: Mapping[str, tuple[int, ...]]
    tied_tokens: Mapping[str, str]


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


def is_plain_linear(module: nn.Module, path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether calling the module, and nothing else, is what computes ``x W^T + b``, W quantised or not."""
    plain = (
        (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)
        or (isinstance(module, Conv1D) and type(module).forward is Conv1D.forward)
        or is_quantized(module)
    )
    # MultiheadAttention reads out_proj.weight and never calls the module.
    return plain and not isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)


def output_embedding(model: nn.Module) -> nn.Module | None:
    """Return the layer that maps hidden states to logits, where the model has transformers' getter for it."""
    getter = getattr(model, "get_output_embeddings", None)
    module = getter() if callable(getter) else None
    if isinstance(module, LoraLayer):
        return module.base_layer
    return module if isinstance(module, nn.Module) else None


def resolve_targets(model: nn.Module, config: LoraConfig) -> Targets:
    """Return what `inject` adapts; see there."""
    modules = base_modules(model)
    config = _named(model, with_head(config), modules)
    matched = [path for path in modules if path and config.targets(path)] if config.target_modules else []
    parameters = _parameters(modules, config, matched)
    if not matched and not parameters:
        raise TargetError(
            f"target_modules: expected the name of a linear layer, got {_shown(config.target_modules)}, "
            f"which no module matches; candidates: {_candidates(modules) or 'none, no layer is linear'}"
        )
    for path in matched:
        _check_kind(path, modules)
        outer = path.rpartition(".")[0]
        if _is_out_proj(path, modules) and outer not in matched:
            raise TargetError(
                f"{path}: expected a layer that the model calls, got a part of an nn.MultiheadAttention, "
                f"which reads its weight alone; name the whole module, {outer}"
            )
    matched = _with_out_proj(matched, modules, config)
    config, matched, tied = tied_targets(matched, modules, config)
    updated = (*matched, *tied, *(full.rpartition(".")[0] for full in parameters))
    tokens, tied_tokens = token_targets(model, modules, config, updated)
    if any(isinstance(modules[path], Conv1D) for path in matched) != config.fan_in_fan_out:
        # It says how a weight is stored, which the model's class decides.
        config = replace(config, fan_in_fan_out=not config.fan_in_fan_out)
    return Targets(config, tuple(matched), parameters, tied, tokens, tied_tokens)


def _named(model: nn.Module, config: LoraConfig, modules: Mapping[str, nn.Module]) -> LoraConfig:
    """Resolve the shorthands of ``target_modules``."""
    linear = [path for path, module in modules.items() if path and is_plain_linear(module, path, modules)]
    if config.target_modules is None and config.target_parameters:
        return config
    if config.target_modules is None:
        names = default_targets(getattr(getattr(model, "config", None), "model_type", None), linear)
        if not names:
            raise TargetError(
                f"target_modules: expected names of layers for {type(model).__name__}, which has no default, "
                f"got None; candidates: {_candidates(modules) or 'none, no layer is linear'}"
            )
        return replace(config, target_modules=names)
    if config.names_attention:
        names = attention_targets(linear)
        if not names:
            raise TargetError(
                f"target_modules: expected an architecture of known attention, got "
                f"{type(model).__name__}; name its layers, candidates: {_candidates(modules)}"
            )
        return replace(config, target_modules=names)
    return _every_linear(model, config, modules, linear) if config.names_all_linear else config


def _every_linear(
    model: nn.Module, config: LoraConfig, modules: Mapping[str, nn.Module], linear: Iterable[str]
) -> LoraConfig:
    """Name every linear layer but the output's: by last components where they suffice, else by path."""
    output = output_embedding(model)
    paths = tuple(
        path
        for path in linear
        if modules[path] is not output and config.targets(path) and not config.saves(path)
    )
    if not paths:
        return config
    named = replace(config, target_modules=tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths)))
    if {path for path in modules if path and named.targets(path)} == set(paths):
        return named
    return replace(config, target_modules=paths)


def _parameters(
    modules: Mapping[str, nn.Module], config: LoraConfig, matched: Iterable[str]
) -> tuple[str, ...]:
    """Return the names of the parameters that ``target_parameters`` matches.

    Raises:
        TargetError: one of its entries matches none, or a match can't be adapted.
        ShapeError: a match is neither a matrix nor a stack of such.
    """
    found = []
    for path, module in modules.items():
        for name, _ in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if config.targets_parameter(full):
                _check_parameter(full, modules, matched)
                found.append(full)
    for entry in config.target_parameters or ():
        if not any(matches(full, (entry,)) for full in found):
            raise TargetError(
                f"target_parameters: expected names of a model's parameters, got {entry!r}, "
                "which none matches; name the module and the parameter, as in mlp.experts.down_proj"
            )
    return tuple(found)


def _check_parameter(full: str, modules: Mapping[str, nn.Module], matched: Iterable[str]) -> None:
    """Check that the parameter is read by a call of its module, by nobody else, and is adapted once."""
    path, _, name = full.rpartition(".")
    module = modules[path]
    if not path or type(module).forward is nn.Module.forward or _is_out_proj(path, modules):
        raise TargetError(
            f"{full}: expected a parameter of a module that the model calls, got one of "
            f"{type(module).__name__}; leave it out of target_parameters"
        )
    if path in matched:
        raise TargetError(
            f"{full}: expected one target for it, got target_modules for {path} too; leave one of them out"
        )
    parameter = getattr(module, name)
    if not parameter.is_floating_point() or parameter.element_size() == 1:
        raise TargetError(
            f"{full}: expected float16, bfloat16, float32 or float64, got {parameter.dtype}; "
            "leave it out of target_parameters"
        )
    parameter_shapes(module, name, 1)
    _check_own(full, parameter, modules)


def _check_own(name: str, parameter: Tensor, modules: Mapping[str, nn.Module]) -> None:
    """Check that one module alone, under one path, has the parameter."""
    path = name.rpartition(".")[0]
    for other, module in modules.items():
        if other != path and any(own is parameter for own in module.parameters(recurse=False)):
            raise TargetError(
                f"{name}: expected a parameter of its own, got one that {other} has too; an update of it "
                "would count in one of them: leave it out of the targets"
            )


def _check_kind(path: str, modules: Mapping[str, nn.Module]) -> None:
    module = modules[path]
    adaptable = (
        is_plain_linear(module, path, modules)
        or isinstance(module, (nn.Embedding, *CONVOLUTIONS, nn.MultiheadAttention))
        or _is_out_proj(path, modules)
    )
    if not adaptable:
        raise TargetError(
            f"{path}: expected a linear, embedding, convolution or nn.MultiheadAttention layer that the "
            f"model calls, got {type(module).__name__}; candidates: {_candidates(modules)}"
        )


def _is_out_proj(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the module is a MultiheadAttention's output projection, which is adapted with it."""
    return isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)


def _with_out_proj(matched: Iterable[str], modules: Mapping[str, nn.Module], config: LoraConfig) -> list[str]:
    """Return the paths, and that of each MultiheadAttention's output projection, which is adapted with it.

    Raises:
        TargetError: a MultiheadAttention shares its weights.
        ConfigError: the patterns give the two different values, of which PEFT would use the module's own.
    """
    found: dict[str, None] = {}
    for path in matched:
        found[path] = None
        module = modules[path]
        if not isinstance(module, nn.MultiheadAttention):
            continue
        out = f"{path}.out_proj"
        found[out] = None
        for option, value in (("rank_pattern", config.rank_of), ("alpha_pattern", config.alpha_of)):
            if value(path) != value(out):
                raise ConfigError(
                    f"{option}: expected one value for {path} and {out}, which PEFT adapts together, got "
                    f"{value(path)} and {value(out)}; use a pattern for both, as in "
                    f"{path.rpartition('.')[2]}(\\.out_proj)?"
                )
        if module.in_proj_weight is not None:
            _check_own(f"{path}.in_proj_weight", module.in_proj_weight, modules)
            _check_own(f"{out}.weight", module.out_proj.weight, modules)
    return list(found)


def _candidates(modules: Mapping[str, nn.Module]) -> str:
    counts: dict[str, int] = defaultdict(int)
    for path, module in modules.items():
        if path and is_plain_linear(module, path, modules):
            counts[path.rpartition(".")[2]] += 1
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def _shown(targets: tuple[str, ...] | str | None) -> str:
    return ", ".join(map(repr, targets)) if isinstance(targets, tuple) else repr(targets)
