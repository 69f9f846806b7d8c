"""What LoRA means, in NumPy: forward, backward, merge, rounding and error bounds."""

from .bounds import (
    adapted_linear_backward_bound,
    adapted_linear_forward_bound,
    linear_backward_bound,
    linear_forward_bound,
    merge_bound,
    merged_against_unmerged_bound,
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
from .linear import (
    LinearGradients,
    adapted_linear_backward,
    adapted_linear_forward,
    linear_backward,
    linear_forward,
)
from .low_rank import LayerGradients, LowRank, LowRankGradients, fused_adapters
from .merge import merge
from .precision import Precision, gamma, probable_gamma
from .rounding import round_float64, round_fraction, round_to
from .scaling import lora_scaling

__all__ = [
    "CheckError",
    "ConfigError",
    "DTypeError",
    "DataError",
    "FileError",
    "LayerGradients",
    "LinearGradients",
    "LoracleError",
    "LowRank",
    "LowRankGradients",
    "NonFiniteError",
    "Precision",
    "ShapeError",
    "TargetError",
    "adapted_linear_backward",
    "adapted_linear_backward_bound",
    "adapted_linear_forward",
    "adapted_linear_forward_bound",
    "fused_adapters",
    "gamma",
    "linear_backward",
    "linear_backward_bound",
    "linear_forward",
    "linear_forward_bound",
    "lora_scaling",
    "merge",
    "merge_bound",
    "merge_exact",
    "merged_against_unmerged_bound",
    "merged_forward_bound",
    "probable_gamma",
    "product_noise",
    "round_float64",
    "round_fraction",
    "round_to",
    "unit_roundoff",
]
