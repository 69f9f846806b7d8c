"""LoRA in PyTorch: layers, injection, adapter files, merging and training."""

from typing import TYPE_CHECKING, Any

from loracle.files import LoraConfig

from .active import disable_adapter, set_adapter
from .adapter_io import adapter_of, load_adapter, save_adapter
from .data import read_examples
from .dequantize import dequantize
from .foreign import load_litgpt, load_loralib
from .function import lora_linear
from .fused import LoraFusedLinear
from .inject import eject, inject, injected_config
from .injected import lora_layers
from .layer import LoraLayer
from .linear import LoraLinear
from .merge import merge, merge_and_unload, unmerge
from .options import FinetuneOptions
from .quantization import register_quantized
from .quantized import LoraQuantizedLinear
from .targets import parse_targets

if TYPE_CHECKING:
    from .results import FinetuneResult
    from .training import finetune

__all__ = [
    "FinetuneOptions",
    "FinetuneResult",
    "LoraConfig",
    "LoraFusedLinear",
    "LoraLayer",
    "LoraLinear",
    "LoraQuantizedLinear",
    "adapter_of",
    "dequantize",
    "disable_adapter",
    "eject",
    "finetune",
    "inject",
    "injected_config",
    "load_adapter",
    "load_litgpt",
    "load_loralib",
    "lora_layers",
    "lora_linear",
    "merge",
    "merge_and_unload",
    "parse_targets",
    "read_examples",
    "register_quantized",
    "save_adapter",
    "set_adapter",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    """Import the training code, and with it transformers' Trainer, when it is first asked for."""
    if name in ("FinetuneResult", "finetune"):
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
