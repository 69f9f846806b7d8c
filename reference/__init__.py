"""What LoRA means, in NumPy: forward, backward, merge, rounding and error bounds."""

from .errors import (
    CheckError,
    ConfigError,
    DataError,
    DTypeError,
    FileError,
    LoracleError,
    NonFiniteError,
    ShapeError,
    TargetError,
)
from .rounding import round_float64, round_fraction, round_to
from .scaling import lora_scaling

__all__ = [
    "CheckError",
    "ConfigError",
    "DTypeError",
    "DataError",
    "FileError",
    "LoracleError",
    "NonFiniteError",
    "ShapeError",
    "TargetError",
    "lora_scaling",
    "round_float64",
    "round_fraction",
    "round_to",
]
