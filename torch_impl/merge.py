"""Merge a model's active adapters into its weights, and put the weights back bit for bit."""

from collections import deque
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from loracle.reference import TargetError

from .inject import unload
from .injected import lora_layers
from .layer import LoraLayer

Merged = Callable[[], Mapping[str, Tensor]]
"""What `LoraLayer.start_merge` returns."""
_AT_ONCE = 2
"""Merges that are under way where memory counts: a device has work while one is waited for."""


def merge(model: nn.Module) -> tuple[str, ...]:
    """Give each adapted layer its weights with the active adapters in them, correctly rounded to W0's dtype.

    A linear weight becomes ``W0 + sum over adapters of scaling * lora_B @ lora_A``: the exact real number,
    rounded once. All weights are computed before the first is exchanged, so an error leaves the model as it
    was. The base's own are kept: a merged model holds both. Linear weights on a CUDA device are merged there,
    see `loracle.torch_impl.device_merge`; the numbers are the same. See `loracle.reference.merge_adapters`.

    Returns:
        The paths of the merged layers.

    Raises:
        TargetError: the model has no active adapters, or a layer is merged already.
        NonFiniteError: a tensor holds NaN or infinity, or a merged entry overflows; it is named.
    """
    layers = _mergeable(model)
    for path, tensors in _all_merged(layers).items():
        layers[path].set_merged(tensors)
    return tuple(layers)


def unmerge(model: nn.Module) -> tuple[str, ...]:
    """Put each merged layer's own weights back, the same tensors and bits; return those layers' paths."""
    merged = {path: layer for path, layer in lora_layers(model).items() if layer.merged}
    for layer in merged.values():
        layer.restore_base()
    return tuple(merged)


def merge_and_unload(model: nn.Module) -> tuple[str, ...]:
    """Merge the active adapters for good: the model is a plain one again, and keeps nothing of them.

    Numbers and errors are those of `merge`, and an error leaves the model as it was. A model that is merged
    already stays merged. Beside the model there are the merged weights of a few layers at a time: those whose
    merge is known to succeed (`LoraLayer.merges_surely`) are merged when all others are computed, and each
    one's own weights let go of then.

    Returns:
        The paths of the merged layers.

    Raises:
        TargetError: the model has no active adapters, or a layer is merged already.
        NonFiniteError: as `merge`.
    """
    done = tuple(path for path, layer in lora_layers(model).items() if layer.merged)
    if not done:
        layers = _mergeable(model)
        done = tuple(layers)
        sure = {path: layer for path, layer in layers.items() if layer.merges_surely(layer.active)}
        held = _all_merged({path: layer for path, layer in layers.items() if path not in sure})
        for path, tensors in held.items():
            _replace(layers[path], tensors)
        started: deque[tuple[LoraLayer, Merged]] = deque()
        for path, layer in sure.items():
            started.append((layer, layer.start_merge(layer.active, path)))
            if len(started) > _AT_ONCE:
                _finish(*started.popleft())
        for one in started:
            _finish(*one)
    unload(model)
    return done


def _mergeable(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the layers with active adapters, by path."""
    layers = lora_layers(model)
    if not layers:
        raise TargetError(f"{type(model).__name__}: expected a model with adapters, got none; inject() first")
    if not any(layer.active for layer in layers.values()):
        raise TargetError(
            f"{type(model).__name__}: expected an active adapter, got none; set_adapter() first"
        )
    for path, layer in layers.items():
        if layer.merged:
            raise TargetError(f"{path}: expected an unmerged adapter, got a merged one; unmerge() first")
    return {path: layer for path, layer in layers.items() if layer.active}


def _all_merged(layers: Mapping[str, LoraLayer]) -> dict[str, Mapping[str, Tensor]]:
    """Return the merged parameters of each layer; all are started before the first is waited for."""
    started = {path: layer.start_merge(layer.active, path) for path, layer in layers.items()}
    return {path: result() for path, result in started.items()}


def _finish(layer: LoraLayer, result: Merged) -> None:
    _replace(layer, result())


def _replace(layer: LoraLayer, tensors: Mapping[str, Tensor]) -> None:
    """Give a layer merged parameters for good: from here on it computes what it did, without adapters."""
    layer.set_merged(tensors)
    layer.forget_base()
