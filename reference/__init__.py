"""What LoRA means, in NumPy: forward, backward, merge, rounding and error bounds."""

from .amplification import amplification_factor, amplification_factor_bound
from .attention import attention_backward, attention_forward, attention_scores
from .attention_bounds import attention_backward_bound, attention_forward_bound
from .attention_inputs import (
    Attention,
    AttentionGradients,
    Projection,
    ProjectionGradients,
    Projections,
)
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
from .convolution import convolution_backward, convolution_delta_factors, convolution_forward
from .convolution_bounds import convolution_backward_bound, convolution_forward_bound
from .dora import DoraGradients, dora_backward, dora_forward, dora_magnitude_start, dora_norm
from .dora_bounds import dora_backward_bound, dora_forward_bound, dora_merge_bound, dora_norm_bound
from .dora_merge import merge_dora, merge_dora_exact
from .embedding import embedding_backward, embedding_forward
from .embedding_bounds import embedding_backward_bound, embedding_forward_bound
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
from .experts import expert_factors_from_peft, experts_backward, experts_forward
from .experts_bounds import experts_backward_bound, experts_forward_bound
from .extraction import ExtractedAdapter, extract_adapter
from .fastfood import Fastfood, fastfood_projection, walsh_hadamard
from .initialization import (
    Start,
    embedding_start,
    gaussian_start,
    kaiming_both_start,
    kaiming_start,
    orthogonal_start,
)
from .intrinsic import Subspace, subspace_gradient, subspace_parameters
from .intrinsic_bounds import subspace_gradient_bound, subspace_parameters_bound
from .linear import (
    LinearGradients,
    adapted_linear_backward,
    adapted_linear_forward,
    linear_backward,
    linear_forward,
)
from .low_rank import LayerGradients, LowRank, LowRankGradients, fused_adapters
from .low_rank_approximation import LowRankApproximation, low_rank_approximation, numerical_rank
from .merge import (
    merge,
    merge_adapters,
)
from .merge_differences import MergeDifferences, merge_differences
from .merge_layers import (
    merge_bias,
    merge_convolution,
    merge_embedding,
    merge_experts,
)
from .optimizer import (
    AdamWOptions,
    AdamWState,
    LoraPlusRates,
    adamw_start,
    adamw_step,
    clip_by_global_norm,
    loraplus_rates,
)
from .optimizer_bounds import AdamWBound, adamw_step_bound, clip_bound
from .precision import Precision, gamma, probable_gamma
from .random_projection import DenseProjection, dense_projection
from .rank import (
    ParameterCounts,
    RankFactorization,
    adapter_parameter_counts,
    parameter_counts,
    rank,
    rank_factorization,
)
from .rotary import apply_rotary, apply_rotary_backward, rotary_tables
from .rounding import round_float64, round_fraction, round_to
from .scaling import lora_scaling
from .softmax import softmax, softmax_backward
from .spectra import (
    delta_singular_values,
    delta_svd,
    delta_svd_error_bound,
    effective_rank,
    rank_for_energy,
    stable_rank,
)
from .subspace import subspace_similarity, subspace_similarity_bound, subspace_similarity_grid
from .svd import Svd, svd_error_bound
from .trainable_bias import bias_is_trained
from .training import AdapterTraining, adapter_step, squared_error_gradient, train_linear, training_start
from .unmerge import (
    UnmergeRecord,
    unmerge,
    unmerge_record,
)
from .weight_initialization import adapter_start, olora_start, pissa_start
from .windows import Convolution

__all__ = [
    "AdamWBound",
    "AdamWOptions",
    "AdamWState",
    "AdapterTraining",
    "Attention",
    "AttentionGradients",
    "CheckError",
    "ConfigError",
    "Convolution",
    "DTypeError",
    "DataError",
    "DenseProjection",
    "DoraGradients",
    "ExtractedAdapter",
    "Fastfood",
    "FileError",
    "LayerGradients",
    "LinearGradients",
    "LoraPlusRates",
    "LoracleError",
    "LowRank",
    "LowRankApproximation",
    "LowRankGradients",
    "MergeDifferences",
    "NonFiniteError",
    "ParameterCounts",
    "Precision",
    "Projection",
    "ProjectionGradients",
    "Projections",
    "RankFactorization",
    "ShapeError",
    "Start",
    "Subspace",
    "Svd",
    "TargetError",
    "UnmergeRecord",
    "adamw_start",
    "adamw_step",
    "adamw_step_bound",
    "adapted_linear_backward",
    "adapted_linear_backward_bound",
    "adapted_linear_forward",
    "adapted_linear_forward_bound",
    "adapter_parameter_counts",
    "adapter_start",
    "adapter_step",
    "amplification_factor",
    "amplification_factor_bound",
    "apply_rotary",
    "apply_rotary_backward",
    "attention_backward",
    "attention_backward_bound",
    "attention_forward",
    "attention_forward_bound",
    "attention_scores",
    "bias_is_trained",
    "clip_bound",
    "clip_by_global_norm",
    "convolution_backward",
    "convolution_backward_bound",
    "convolution_delta_factors",
    "convolution_forward",
    "convolution_forward_bound",
    "delta_singular_values",
    "delta_svd",
    "delta_svd_error_bound",
    "dense_projection",
    "dora_backward",
    "dora_backward_bound",
    "dora_forward",
    "dora_forward_bound",
    "dora_magnitude_start",
    "dora_merge_bound",
    "dora_norm",
    "dora_norm_bound",
    "effective_rank",
    "embedding_backward",
    "embedding_backward_bound",
    "embedding_forward",
    "embedding_forward_bound",
    "embedding_start",
    "expert_factors_from_peft",
    "experts_backward",
    "experts_backward_bound",
    "experts_forward",
    "experts_forward_bound",
    "extract_adapter",
    "fastfood_projection",
    "fused_adapters",
    "gamma",
    "gaussian_start",
    "kaiming_both_start",
    "kaiming_start",
    "linear_backward",
    "linear_backward_bound",
    "linear_forward",
    "linear_forward_bound",
    "lora_scaling",
    "loraplus_rates",
    "low_rank_approximation",
    "merge",
    "merge_adapters",
    "merge_bias",
    "merge_bound",
    "merge_convolution",
    "merge_differences",
    "merge_dora",
    "merge_dora_exact",
    "merge_embedding",
    "merge_exact",
    "merge_experts",
    "merged_against_unmerged_bound",
    "merged_forward_bound",
    "numerical_rank",
    "olora_start",
    "orthogonal_start",
    "parameter_counts",
    "pissa_start",
    "probable_gamma",
    "product_noise",
    "rank",
    "rank_factorization",
    "rank_for_energy",
    "rotary_tables",
    "round_float64",
    "round_fraction",
    "round_to",
    "softmax",
    "softmax_backward",
    "squared_error_gradient",
    "stable_rank",
    "subspace_gradient",
    "subspace_gradient_bound",
    "subspace_parameters",
    "subspace_parameters_bound",
    "subspace_similarity",
    "subspace_similarity_bound",
    "subspace_similarity_grid",
    "svd_error_bound",
    "train_linear",
    "training_start",
    "unit_roundoff",
    "unmerge",
    "unmerge_record",
    "walsh_hadamard",
]
