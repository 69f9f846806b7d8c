"""Put adapted layers in place of a model's own, and take them out again."""

from collections.abc import Mapping

import torch
from torch import nn

from loracle.files import LoraConfig
from loracle.reference import ConfigError, TargetError

from .injected import InjectedAdapter, forget, injected, injected_or_new, keep, lora_layers
from .kinds import adapted_layer
from .layer import DEFAULT, LoraLayer
from .linear import LoraLinear
from .shared_input import watch_siblings
from .targets import Targets, base_modules, resolve_targets
from .update import UpdateOptions, check_adapter_name
from .whole_tensors import whole_tensors


def inject(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str = DEFAULT,
    *,
    generator: torch.Generator | None = None,
) -> tuple[str, ...]:
    """Wrap every targeted layer of ``model`` in a `LoraLayer`, freeze all other parameters, and activate the
    new adapter.

    ``config.target_modules`` has PEFT's meaning: a tuple of names (a module's whole path or its end), a
    regular expression that matches the whole path, or ``"all-linear"`` (every linear layer but the output
    embedding). None is the architecture's default, query and value; beyond PEFT, ``"attention"`` is the
    query, key, value and output projections. The configuration kept with the model (`injected_config`) has
    these resolved to names, so that PEFT understands it.

    ``bias`` and ``modules_to_save`` exchange parameters for copies that train; the base's own are kept, and
    come back with `set_adapter`, `disable_adapter` and `eject`.

    Args:
        model: changed in place; untouched when an error is raised.
        config: ranks, alphas, dropout and targets; the patterns apply by path.
        adapter_name: what to call it; a model may have several.
        generator: where starts are drawn from, in the order of the paths; torch's global one when None.

    Returns:
        The paths of the adapted layers, in the model's order.

    Raises:
        TargetError: nothing matches (the candidates are listed), a match can't be adapted, shares its weight
            with another module without ``ensure_weight_tying``, or is merged.
        ConfigError: the name is taken, or a layer can't do what the configuration asks for.
        NonFiniteError: a start is taken from a weight that holds NaN or infinity.
    """
    state = injected_or_new(model)
    if check_adapter_name(adapter_name) in state.adapters:
        raise ConfigError(
            f"adapter_name: expected a new one, got {adapter_name!r}; eject() it, or choose another"
        )
    targets = resolve_targets(model, config)
    modules = base_modules(model)
    present = lora_layers(model)
    for path in targets.modules:
        if path in present and present[path].merged:
            raise TargetError(f"{path}: expected an unmerged layer, got a merged one; unmerge() first")
    whole = whole_tensors(modules, targets.modules, targets.config)
    layers = _layers(targets, modules, present, adapter_name, generator)
    # Nothing can go wrong from here on.
    if not state.adapters:
        model.requires_grad_(False)
    for path, layer in layers.items():
        if path not in present:
            _replace(model, path, layer)
    state.adapters[adapter_name] = InjectedAdapter(targets, layers, whole)
    keep(model, state)
    state.activate((adapter_name,))
    watch_siblings(
        (path, layer) for path, layer in lora_layers(model).items() if isinstance(layer, LoraLinear)
    )
    return tuple(layers)


def _layers(
    targets: Targets,
    modules: Mapping[str, nn.Module],
    present: Mapping[str, LoraLayer],
    name: str,
    generator: torch.Generator | None,
) -> dict[str, LoraLayer]:
    """Return a layer with the new adapter for each path; those already there get it when none has failed."""
    config = targets.config
    layers: dict[str, LoraLayer] = {}
    added: list[LoraLayer] = []
    try:
        for path in targets.modules:
            options = UpdateOptions(
                r=config.rank_of(path),
                lora_alpha=config.alpha_of(path),
                dropout=config.lora_dropout,
                use_rslora=config.use_rslora,
                lora_bias=config.lora_bias,
                use_dora=config.use_dora,
                init=config.init_lora_weights,
            )
            layer = present[path] if path in present else adapted_layer(modules[path], path)
            layer.add_adapter(name, options, generator)
            layers[path] = layer
            added.append(layer)
    except BaseException:
        for layer in added:
            layer.remove_adapter(name)
        raise
    return layers


def eject(model: nn.Module, adapter_name: str | None = None) -> tuple[str, ...]:
    """Take an adapter out, all of them when none is named, and return the paths of its layers.

    A layer without adapters becomes the base layer again, and the model what it was before `inject`, bit for
    bit. A merged layer is unmerged first; `merge_and_unload` is how to keep a merge. The parameters stay
    frozen, and no adapter is active afterwards.

    Raises:
        TargetError: there is no such adapter.
    """
    state = injected_or_new(model)
    names = tuple(state.adapters) if adapter_name is None else (state.only(adapter_name)[0],)
    for layer in lora_layers(model).values():
        layer.restore_base()
    state.activate(())
    paths: dict[str, None] = {}
    for name in names:
        for layer in state.adapters.pop(name).layers.values():
            layer.remove_adapter(name)
    for path, layer in lora_layers(model).items():
        if not layer.adapters:
            _replace(model, path, layer.base_layer)
            paths[path] = None
    if not state.adapters:
        forget(model)
    return tuple(paths)


def unload(model: nn.Module) -> None:
    """Put each layer's base in its place as it now is, and forget the adapters."""
    for path, layer in lora_layers(model).items():
        _replace(model, path, layer.base_layer)
    forget(model)


def injected_config(model: nn.Module, adapter_name: str | None = None) -> LoraConfig:
    """Return the configuration that `inject` or `load_adapter` kept, its targets resolved to names.

    Raises:
        TargetError: the model has no such adapter, or several and none is named.
    """
    return injected(model).only(adapter_name)[1].targets.config


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
