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
from .exact import merge_exact
from .merge import merge
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
    "merge",
    "merge_exact",
    "round_float64",
    "round_fraction",
    "round_to",
]
