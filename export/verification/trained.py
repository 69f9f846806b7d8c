"""What was trained: an adapter folder in PEFT's layout, or the file of a loralib state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loracle.files import Adapter, adapter_from_loralib, read_adapter
from loracle.reference import ConfigError, DTypeError, FileError, NonFiniteError, ShapeError, TargetError


@dataclass(frozen=True)
class LoralibLayers:
    """What a loralib state dict does not hold of its layers; see `loracle.files.adapter_from_loralib`."""

    r: int
    lora_alpha: float
    fan_in_fan_out: bool = False
    enable_lora: Mapping[str, Sequence[bool]] = field(default_factory=dict)


def read_trained(path: Path, layers: LoralibLayers | None = None) -> Adapter:
    """Read an adapter.

    Args:
        path: a folder as PEFT writes it; or what `torch.save` made of `loralib.lora_state_dict(model)`.
        layers: of the loralib file; None for a folder.

    Raises:
        ConfigError: `layers` is missing, or given for a folder.
        LoracleError: as `read_adapter` and `adapter_from_loralib`; the message names the file.
    """
    if not path.is_file():
        if layers is not None:
            raise ConfigError(
                f"{path}: expected a loralib state dict for the rank and alpha given, got no file; leave "
                "them out, an adapter folder has its own"
            )
        return read_adapter(path)
    if layers is None:
        raise ConfigError(
            f"{path}: expected the rank and alpha of a loralib state dict, got none; give both, or the "
            "folder of a PEFT adapter"
        )
    from loracle.torch_impl.state_file import read_state_dict

    state = read_state_dict(path)
    try:
        return adapter_from_loralib(
            state,
            r=layers.r,
            lora_alpha=layers.lora_alpha,
            fan_in_fan_out=layers.fan_in_fan_out,
            enable_lora=layers.enable_lora,
        )
    except (ConfigError, FileError, TargetError, ShapeError, DTypeError, NonFiniteError) as error:
        raise type(error)(f"{path}: {error}") from None
