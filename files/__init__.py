"""Files: adapters and checkpoints in, merged checkpoints out, whole or not at all."""

from .adapter import Adapter, LoraPair, read_adapter, write_adapter, write_adapter_files
from .atomic import output_folder, write_atomic
from .cache import cache_folder
from .checkpoint import Checkpoint, Tensors
from .config import LoraConfig
from .head_config import HeadConfig
from .litgpt import adapter_from_litgpt
from .loralib import adapter_from_loralib
from .merged_checkpoint import MergedCheckpoint, write_merged_checkpoint
from .parameters import name_parameters
from .sidecar import copy_sidecars, sidecar_bytes
from .space import require_space
from .tensor_names import resolve_name
from .weights import MergedWeights

__all__ = [
    "Adapter",
    "Checkpoint",
    "HeadConfig",
    "LoraConfig",
    "LoraPair",
    "MergedCheckpoint",
    "MergedWeights",
    "Tensors",
    "adapter_from_litgpt",
    "adapter_from_loralib",
    "cache_folder",
    "copy_sidecars",
    "name_parameters",
    "output_folder",
    "read_adapter",
    "require_space",
    "resolve_name",
    "sidecar_bytes",
    "write_adapter",
    "write_adapter_files",
    "write_atomic",
    "write_merged_checkpoint",
]
