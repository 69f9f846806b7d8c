"""Merge a model's active adapters into its weights, and put the weights back bit for bit."""

from torch import nn

from loracle.reference import TargetError

from .inject import unload
from .injected import lora_layers


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
    started = {path: layer.start_merge(layer.active, path) for path, layer in layers.items() if layer.active}
    merged = {path: result() for path, result in started.items()}
    for path, tensors in merged.items():
        layers[path].set_merged(tensors)
    return tuple(merged)


def unmerge(model: nn.Module) -> tuple[str, ...]:
    """Put each merged layer's own weights back, the same tensors and bits; return those layers' paths."""
    merged = {path: layer for path, layer in lora_layers(model).items() if layer.merged}
    for layer in merged.values():
        layer.restore_base()
    return tuple(merged)


def merge_and_unload(model: nn.Module) -> tuple[str, ...]:
    """Merge the active adapters for good: the model is a plain one again, and keeps nothing of them.

    Returns and raises what `merge` does; a model that is merged already stays merged.
    """
    layers = lora_layers(model)
    done = tuple(path for path, layer in layers.items() if layer.merged) or merge(model)
    unload(model)
    return done
