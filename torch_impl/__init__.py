"""LoRA in PyTorch: layers, injection, adapter files, merging and training."""

from typing import TYPE_CHECKING, Any

from loracle.files import LoraConfig

from .adapter_io import adapter_of, load_adapter, save_adapter
from .data import read_examples
from .function import lora_linear
from .inject import eject, inject, lora_layers, parse_targets
from .layers import LoraLinear
from .merge import merge, unmerge
from .options import FinetuneOptions

if TYPE_CHECKING:
    from .training import FinetuneResult, finetune

__all__ = [
    "FinetuneOptions",
    "FinetuneResult",
    "LoraConfig",
    "LoraLinear",
    "adapter_of",
    "eject",
    "finetune",
    "inject",
    "load_adapter",
    "lora_layers",
    "lora_linear",
    "merge",
    "parse_targets",
    "read_examples",
    "save_adapter",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    """Import the training code, and with it transformers' Trainer, when it is first asked for."""
    if name in ("FinetuneResult", "finetune"):
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
