"""Files: adapters and checkpoints in, merged checkpoints out, whole or not at all."""

from .adapter import Adapter, LoraPair, read_adapter, write_adapter, write_adapter_files
from .atomic import output_folder, write_atomic
from .checkpoint import Checkpoint
from .config import LoraConfig

__all__ = [
    "Adapter",
    "Checkpoint",
    "LoraConfig",
    "LoraPair",
    "output_folder",
    "read_adapter",
    "write_adapter",
    "write_adapter_files",
    "write_atomic",
]
