"""Put adapted layers in place of a model's own, and take them out again."""

from collections.abc import Mapping

import torch
from torch import nn

from loracle.files import LoraConfig
from loracle.reference import ConfigError, NonFiniteError, TargetError

from .injected import InjectedAdapter, forget, injected, injected_or_new, keep, lora_layers
from .kinds import adapted_layer
from .layer import DEFAULT, LoraLayer
from .linear import LoraLinear
from .module_tree import base_modules, layers_of, put, wrappers
from .parameters import LoraParameter, LoraParameters
from .placing import check_ties, check_tokens, in_order, place_rows, share_updates
from .read_weights import LoraModule
from .shared_input import watch_siblings
from .targets import Targets, resolve_targets
from .token_rows import TokenRows
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

    With ``ensure_weight_tying`` an embedding's update counts in the output layer that is tied to it too. The
    rows of ``trainable_token_indices`` count, always, in whatever is tied to their embedding.

    ``bias`` and ``modules_to_save`` exchange parameters for copies that train; the base's own are kept, and
    come back with `set_adapter`, `disable_adapter` and `eject`.

    Args:
        model: changed in place; untouched when an error is raised.
        config: ranks, alphas, dropout and targets; the patterns apply by path.
        adapter_name: what to call it; a model may have several.
        generator: where starts are drawn from, in the order of the paths; torch's global one when None.

    Returns:
        The paths of the adapted layers, in the model's order; then the full names of the stacked parameters.

    Raises:
        TargetError: nothing matches (the candidates are listed), a match can't be adapted, shares its weight
            with another module without ``ensure_weight_tying``, or is merged.
        ConfigError: the name is taken, or a layer can't do what the configuration asks for.
        NonFiniteError: a start is taken from a weight that holds NaN or infinity, or DoRA's norm of a row is
            zero.
    """
    return inject_with_start(model, config, adapter_name, config.init_lora_weights, generator)


def inject_with_start(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str,
    init: bool | str,
    generator: torch.Generator | None,
) -> tuple[str, ...]:
    """Do as `inject` does, with another start than ``config.init_lora_weights``."""
    state = injected_or_new(model)
    if check_adapter_name(adapter_name) in state.adapters:
        raise ConfigError(
            f"adapter_name: expected a new one, got {adapter_name!r}; eject() it, or choose another"
        )
    targets = resolve_targets(model, config)
    modules = base_modules(model)
    present = lora_layers(model)
    for path in (*targets.modules, *targets.parameters):
        if path in present and present[path].merged:
            raise TargetError(f"{path}: expected an unmerged layer, got a merged one; unmerge() first")
    whole = whole_tensors(modules, (*targets.modules, *targets.tied), targets.config)
    placed = dict(wrappers(model))
    _check_places(targets, placed)
    check_tokens(targets, modules, whole, placed)
    layers, tokens = _layers(targets, modules, placed, adapter_name, init, generator)
    # Nothing can go wrong from here on.
    if not state.adapters:
        model.requires_grad_(False)
    for full in targets.parameters:
        _attach(layers[full], full, modules, placed)
    for path, wrapper in placed.items():
        put(model, path, wrapper)
    state.adapters[adapter_name] = InjectedAdapter(targets, layers, whole, tokens)
    keep(model, state)
    state.activate((adapter_name,))
    watch_siblings(
        (path, layer) for path, layer in lora_layers(model).items() if isinstance(layer, LoraLinear)
    )
    return tuple(layers)


def _layers(
    targets: Targets,
    modules: Mapping[str, nn.Module],
    placed: dict[str, LoraLayer | LoraModule],
    name: str,
    init: bool | str,
    generator: torch.Generator | None,
) -> tuple[dict[str, LoraLayer], dict[str, TokenRows]]:
    """Return a layer with the new adapter for each path, and for each with trained rows; those already there
    get it when none has failed.

    ``placed`` has what is in the modules' places by path, and gets what is to be.
    """
    config = targets.config
    trained_before = {
        id(own): own.requires_grad for module in modules.values() for own in module.parameters(recurse=False)
    }
    there = {
        own: layer for path, wrapper in placed.items() for own, layer in layers_of(wrapper, path).items()
    }
    layers: dict[str, LoraLayer] = {}

    def options_of(path: str) -> UpdateOptions:
        return UpdateOptions(
            r=config.rank_of(path),
            lora_alpha=config.alpha_of(path),
            dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            lora_bias=config.lora_bias,
            use_dora=config.use_dora,
            init=init,
        )

    check_ties(targets, options_of)
    try:
        for path in (*targets.modules, *targets.parameters):
            if path not in there and path in targets.parameters:
                owner, _, parameter = path.rpartition(".")
                there[path] = LoraParameter(modules[owner], parameter)
            elif path not in there:
                placed[path] = adapted_layer(modules[path], path, modules.get(path.rpartition(".")[0]))
                there |= layers_of(placed[path], path)
            layer = there[path]
            try:
                layer.add_adapter(name, options_of(path), generator)
            except NonFiniteError as error:
                raise NonFiniteError(f"{path}: {error}") from None
            layers[path] = layer
        layers |= share_updates(targets, modules, placed, name)
        tokens = place_rows(targets, modules, placed, name)
    except BaseException:
        for path, wrapper in placed.items():
            for layer in layers_of(wrapper, path).values():
                layer.remove_adapter(name)
        # A layer freezes what it wraps.
        for module in modules.values():
            for own in module.parameters(recurse=False):
                own.requires_grad_(trained_before[id(own)])
        raise
    return in_order(layers, modules), tokens


def _attach(
    layer: LoraLayer, full: str, modules: Mapping[str, nn.Module], placed: dict[str, LoraLayer | LoraModule]
) -> None:
    """Let a parameter's layer be one of those of its module."""
    path = full.rpartition(".")[0]
    wrapper = placed.setdefault(path, LoraParameters(modules[path]))
    assert isinstance(wrapper, LoraParameters)
    assert isinstance(layer, LoraParameter)
    wrapper.attach(layer)


def _check_places(targets: Targets, placed: Mapping[str, LoraLayer | LoraModule]) -> None:
    """Check that another adapter has not updated the modules in another way.

    Raises:
        TargetError: a module has updates of its parameters where its own is due, or the other way round.
    """
    due = {full.rpartition(".")[0]: full for full in targets.parameters}
    for path, wrapper in placed.items():
        stacked = isinstance(wrapper, LoraParameters)
        wanted = due.get(path, path if path in targets.modules else None)
        if wanted is not None and stacked is not (path in due):
            there = ", ".join(layers_of(wrapper, path))
            raise TargetError(
                f"{wanted}: expected the targets that other adapters have in this module, {there}, "
                "got another; name the same, or eject() those"
            )


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
    for name in names:
        for layer in state.adapters.pop(name).placed.values():
            layer.remove_adapter(name)
    paths = tuple(path for path, layer in lora_layers(model).items() if not layer.adapters)
    for path, wrapper in wrappers(model).items():
        if not any(layer.adapters for layer in layers_of(wrapper, path).values()):
            put(model, path, wrapper.base_layer)
    if not state.adapters:
        forget(model)
    return paths


def unload(model: nn.Module) -> None:
    """Put each layer's base in its place as it now is, and forget the adapters."""
    for path, wrapper in wrappers(model).items():
        put(model, path, wrapper.base_layer)
    forget(model)


def injected_config(model: nn.Module, adapter_name: str | None = None) -> LoraConfig:
    """Return the configuration that `inject` or `load_adapter` kept, its targets resolved to names.

    Raises:
        TargetError: the model has no such adapter, or several and none is named.
    """
    return injected(model).only(adapter_name)[1].targets.config
