"""What an attention block is made of, and the checks of its shapes and dtypes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from .errors import ConfigError, DTypeError, LoracleError, ShapeError
from .formats import Array
from .linear import adapter_tensors
from .linear_shapes import check_linear_shapes
from .low_rank import LowRank, LowRankGradients
from .operands import check_dtypes
from .rotary import check_rotary
from .softmax import broadcast_mask

Rotary = tuple[Array, Array]
"""The tables cos and sin, (T, D) each, see `rotary_tables`."""


@dataclass(frozen=True)
class Attention:
    """How an attention block is cut into heads.

    Args:
        heads: H, of the query.
        key_value_heads: K, of key and value; each serves H / K consecutive query heads.
        head_dim: D.
        scale: of the scores; ``head_dim ** -0.5`` by default. A float64, taken as exact.
        causal: whether a token attends to itself and what comes before it, and to nothing else.

    Raises:
        ConfigError: what does not fit is named.

    Source: arXiv 1706.03762, section 3.2; arXiv 2305.13245 for K below H.
    """

    heads: int
    key_value_heads: int
    head_dim: int
    scale: float | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        for name in ("heads", "key_value_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected a number above 0, got {getattr(self, name)}; set it")
        if self.heads % self.key_value_heads:
            raise ConfigError(
                f"key_value_heads: expected a divisor of the {self.heads} heads, got "
                f"{self.key_value_heads}; each serves as many query heads as any other"
            )
        if self.scale is not None and not math.isfinite(self.scale):
            raise ConfigError(f"scale: expected a finite number, got {self.scale}; None is head_dim ** -0.5")

    @property
    def score_scale(self) -> float:
        """What the products of query and key are multiplied by."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def group(self) -> int:
        """How many query heads share a head of key and value."""
        return self.heads // self.key_value_heads


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear layer with adapters, see `adapted_linear_forward`: W0 (out, in), bias (out,)."""

    W0: Array
    adapters: tuple[LowRank, ...] = ()
    bias: Array | None = None


@dataclass(frozen=True, eq=False)
class Projections:
    """The projections of an attention block, Llama's ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``.

    ``W0`` of q is (H D, d), of k and v (K D, d), of o (d, H D). The dropout of an adapter is of the shape of
    the projection's input: (N, T, d), and (N, T, H D) for o.
    """

    q: Projection
    k: Projection
    v: Projection
    o: Projection

    def __iter__(self) -> Iterator[Projection]:
        return iter((self.q, self.k, self.v, self.o))


@dataclass(frozen=True, eq=False)
class ProjectionGradients:
    """Gradients of a projection: of its bias, (out,), and of each adapter in turn. W0 is frozen."""

    dbias: Array
    adapters: tuple[LowRankGradients, ...]


@dataclass(frozen=True, eq=False)
class AttentionGradients:
    """Gradients of an attention block: of x, (N, T, d), and of each projection."""

    dx: Array
    q: ProjectionGradients
    k: ProjectionGradients
    v: ProjectionGradients
    o: ProjectionGradients


def check_attention(
    x: Array,
    projections: Projections,
    attention: Attention,
    rotary: Rotary | None,
    *,
    probabilities: Array | None = None,
    dy: Array | None = None,
) -> None:
    """Check shapes and dtypes of the tensors of an attention block; see `check_attention_shapes`.

    Raises:
        DTypeError: naming the tensor, what was expected and what came.
        ConfigError: objects without probabilities.
    """
    check_attention_shapes(x, projections, attention, rotary, probabilities=probabilities, dy=dy)
    cos, sin = (None, None) if rotary is None else rotary
    check_dtypes(x=x, cos=cos, sin=sin, probabilities=probabilities, dy=dy)
    for field, own in zip(fields(projections), projections, strict=True):
        try:
            check_dtypes(x=x, W0=own.W0, **adapter_tensors(own.adapters), bias=own.bias)
        except DTypeError as error:
            raise DTypeError(f"{field.name} {error}") from None


def check_attention_shapes(
    x: Array,
    projections: Projections,
    attention: Attention,
    rotary: Rotary | None,
    *,
    probabilities: Array | None = None,
    dy: Array | None = None,
) -> None:
    """Check x and dy (N, T, d), the projections', the tables (T, D), probabilities (N, H, T, T).

    Raises:
        ShapeError, ConfigError: naming the first tensor that does not fit, what was expected and what came.
    """
    if x.ndim != 3 or x.shape[1] < 1:
        raise ShapeError(f"x: expected (N, T, d) with T above 0, got {x.shape}; give a batch of sequences")
    n, length, d = x.shape
    inner, shared = attention.heads * attention.head_dim, attention.key_value_heads * attention.head_dim
    shapes = {"q": (inner, d), "k": (shared, d), "v": (shared, d), "o": (d, inner)}
    for name, shape in shapes.items():
        own: Projection = getattr(projections, name)
        if own.W0.shape != shape:
            raise ShapeError(
                f"{name} W0: expected {shape} to fit x {x.shape} and {attention}, got {own.W0.shape}; "
                "is it transposed?"
            )
        try:
            check_linear_shapes(
                np.broadcast_to(0.0, (n, length, shape[1])), own.W0, own.adapters, bias=own.bias
            )
        except LoracleError as error:
            raise type(error)(f"{name} {error}") from None
    if rotary is not None:
        check_rotary(*rotary, (n, attention.heads, length, attention.head_dim), "query")
    scores = (n, attention.heads, length, length)
    for name, tensor, shape in (("probabilities", probabilities, scores), ("dy", dy, x.shape)):
        if tensor is not None and tensor.shape != shape:
            raise ShapeError(
                f"{name}: expected {shape} to fit x {x.shape}, got {tensor.shape}; check its axes"
            )


def attended(mask: Array | None, causal: bool, shape: tuple[int, ...]) -> Array:
    """Return where the scores of (N, H, T, T) count: the mask, and what causality leaves of it.

    Raises:
        ShapeError, DTypeError, ConfigError: the mask is not boolean, does not fit, or leaves a row empty.
    """
    n, _, length, _ = shape
    if mask is not None and mask.shape not in ((length, length), (n, 1, length, length)):
        raise ShapeError(
            f"mask: expected {(length, length)} or {(n, 1, length, length)}, got {mask.shape}; "
            "give a row a query"
        )
    counts = np.tri(length, dtype=bool) if causal else np.ones((length, length), bool)
    if mask is not None:
        broadcast_mask(mask, shape)
        counts = counts & mask
    return broadcast_mask(counts, shape)
