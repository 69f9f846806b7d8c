"""What LoRA means, in NumPy: forward, backward, merge, rounding and error bounds."""

from .bounds import (
    gamma,
    linear_backward_bound,
    linear_forward_bound,
    merged_forward_bound,
    product_noise,
    unit_roundoff,
)
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
from .linear import LinearGradients, linear_backward, linear_forward
from .merge import merge
from .rounding import round_float64, round_fraction, round_to
from .scaling import lora_scaling

__all__ = [
    "CheckError",
    "ConfigError",
    "DTypeError",
    "DataError",
    "FileError",
    "LinearGradients",
    "LoracleError",
    "NonFiniteError",
    "ShapeError",
    "TargetError",
    "gamma",
    "linear_backward",
    "linear_backward_bound",
    "linear_forward",
    "linear_forward_bound",
    "lora_scaling",
    "merge",
    "merge_exact",
    "merged_forward_bound",
    "product_noise",
    "round_float64",
    "round_fraction",
    "round_to",
    "unit_roundoff",
]
