"""Files: adapters and checkpoints in, merged checkpoints out, whole or not at all."""

from .config import LoraConfig

__all__ = ["LoraConfig"]
