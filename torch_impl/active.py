"""Choose which adapters of a model count."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from loracle.reference import TargetError

from .injected import Injected, injected, lora_layers


def set_adapter(model: nn.Module, adapter_names: str | Sequence[str]) -> None:
    """Let the named adapters count, one or several: their updates add up, and they alone train.

    Raises:
        TargetError: one is not there, two train the same tensor whole, or the model is merged.
        ConfigError: several, and one of them has a magnitude (DoRA) in a layer of another.
    """
    state = injected(model)
    names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
    for name in names:
        state.only(name)
    _check_unmerged(model)
    state.activate(names)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Let the model be its base within a ``with`` block; what was active is so again afterwards.

    Raises:
        TargetError: the model has no adapters, or is merged.
    """
    state: Injected = injected(model)
    _check_unmerged(model)
    active = state.active
    state.activate(())
    try:
        yield
    finally:
        state.activate(active)


def _check_unmerged(model: nn.Module) -> None:
    for path, layer in lora_layers(model).items():
        if layer.merged:
            raise TargetError(f"{path}: expected an unmerged adapter, got a merged one; unmerge() first")
