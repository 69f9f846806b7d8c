"""A model's adapters as files in PEFT's format, and such files put into a model."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from loracle.files import Adapter, read_adapter, write_adapter
from loracle.reference import TargetError

from .arrays import array_of, tensor_of
from .inject import inject, injected_config, lora_layers, resolve_targets


def adapter_of(model: nn.Module) -> Adapter:
    """Return copies of the model's adapters with their configuration.

    Raises:
        TargetError: the model has no adapters.
    """
    return Adapter.from_arrays(
        injected_config(model),
        {
            path: (array_of(layer.lora_A).copy(), array_of(layer.lora_B).copy())
            for path, layer in lora_layers(model).items()
        },
    )


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the model's adapters to a new folder in PEFT's format; see `loracle.files.write_adapter`."""
    write_adapter(Path(folder), adapter_of(model))


def load_adapter(model: nn.Module, source: str | Path | Adapter) -> tuple[str, ...]:
    """Inject an adapter's layers into ``model`` and fill them with its values.

    Args:
        model: changed in place; untouched when an error is raised.
        source: a folder in PEFT's format, or an adapter that has been read.

    Returns:
        The paths of the adapted layers.

    Raises:
        TargetError: a tensor has no layer in the model, or a targeted layer no tensor, or a shape differs;
            the message names the tensor and both shapes.
        FileError, ConfigError, NonFiniteError: see `loracle.files.read_adapter`.
    """
    adapter = source if isinstance(source, Adapter) else read_adapter(Path(source))
    _check_fit(model, adapter)
    # Its own generator: loading must not move torch's global one.
    paths = inject(model, adapter.config, generator=torch.Generator())
    fill(model, adapter)
    return paths


def fill(model: nn.Module, adapter: Adapter) -> None:
    """Copy an adapter's values into the layers that are there for it, one for each pair."""
    for path, layer in lora_layers(model).items():
        pair = adapter.pairs[path]
        for parameter, array in ((layer.lora_A, pair.A), (layer.lora_B, pair.B)):
            # float64 adapters keep their values; the half precisions widen exactly.
            wide = np.promote_types(array.dtype, np.float32)
            parameter.data = tensor_of(array.astype(wide)).to(parameter.device)


def _check_fit(model: nn.Module, adapter: Adapter) -> None:
    remedy = "is this adapter for another model?"
    modules = dict(model.named_modules())
    for path, pair in adapter.pairs.items():
        base = modules.get(path)
        if not isinstance(base, nn.Linear):
            found = "no such module" if base is None else type(base).__name__
            raise TargetError(f"{path}: expected an nn.Linear in the model, got {found}; {remedy}")
        r = adapter.config.rank_of(path)
        for name, array, expected in (
            ("lora_A", pair.A, (r, base.in_features)),
            ("lora_B", pair.B, (base.out_features, r)),
        ):
            if array.shape != expected:
                raise TargetError(
                    f"{path}.{name}: expected shape {expected} beside a weight of shape "
                    f"{tuple(base.weight.shape)}, got {array.shape}; {remedy}"
                )
    _, targeted = resolve_targets(model, adapter.config)
    for path in targeted:
        if path not in adapter.pairs:
            raise TargetError(f"{path}: expected lora_A and lora_B for this target, got neither; {remedy}")
    for path in adapter.pairs:
        if path not in targeted:
            raise TargetError(
                f"{path}: expected only layers that target_modules names, got lora_A and lora_B for another; "
                f"{remedy}"
            )
