"""The update of one weight, and what it has to look like."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.reference import DTypeError, NonFiniteError, ShapeError, TargetError

from .config import LoraConfig
from .safetensors_file import DTYPES

FLOATS = tuple(DTYPES[code] for code in ("F16", "BF16", "F32", "F64"))
KINDS = ("linear", "embedding", "convolution", "parameter")


@dataclass(frozen=True, eq=False)
class LoraPair:
    """The update of one weight, ``scaling * B @ A``, its tensors in the shapes of PEFT's files.

    Each array is of float16, bfloat16, float32 or float64.

    Attributes:
        A: linear: (r, in). embedding: (r, V), V tokens. convolution: (r, in, *kernel). parameter, of E
            stacked weights: (E * r, in), the r rows of a weight next to one another; E is 1 for a matrix.
        B: (out, r), (d, r), (out, r, 1, ...) and (out, E * r), the E columns of a rank next to one another.
        scaling: alpha / r, or alpha / sqrt(r); float64.
        kind: what the weight is: ``"linear"``, ``"embedding"``, ``"convolution"`` or ``"parameter"``.
        bias: (out,), the bias of ``lora_B``, of which the layer adds ``scaling * bias``; or None.
        magnitude: DoRA's ``lora_magnitude_vector``, or None. (out,), (d,) or (1, out, 1, ...).
    """

    A: NDArray[Any]
    B: NDArray[Any]
    scaling: float
    kind: str = "linear"
    bias: NDArray[Any] | None = None
    magnitude: NDArray[Any] | None = None

    @property
    def r(self) -> int:
        """The rows of A: the rank; of a stacked parameter, E ranks."""
        return int(self.A.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what the pair adds to: (out, in), (V, d), (out, in, *kernel).

        Of a stacked parameter it is the shape (out, in) of one of its weights. A layer with fan_in_fan_out
        stores the transpose.
        """
        outputs, inputs = int(self.B.shape[0]), tuple(map(int, self.A.shape[1:]))
        return (*inputs, outputs) if self.kind == "embedding" else (outputs, *inputs)

    @property
    def size(self) -> int:
        """The number of entries of all its arrays."""
        return sum(array.size for array in (self.A, self.B, self.bias, self.magnitude) if array is not None)


def check_dtype(name: str, array: NDArray[Any]) -> None:
    """Check for a floating-point dtype. Raises: DTypeError, whose message starts with ``name``."""
    if array.dtype not in FLOATS:
        raise DTypeError(f"{name}: expected a floating-point dtype, got {array.dtype}; convert the adapter")


def check_finite(name: str, array: NDArray[Any]) -> None:
    """Check for NaN and infinity. Raises: NonFiniteError, whose message starts with ``name``."""
    with np.errstate(invalid="ignore"):  # a signalling NaN of float16 or bfloat16
        finite = np.isfinite(array).all()
    if not finite:
        raise NonFiniteError(
            f"{name}: holds NaN or infinity, expected finite numbers; train the adapter again"
        )


def check_pair(
    config: LoraConfig, path: str, pair: LoraPair, rank: int | None, key: Callable[[str], str]
) -> None:
    """Check that the pair's arrays fit one another and the configuration, and are finite.

    Args:
        path: of the module, or the parameter.
        rank: what the configuration says, or None where it says nothing yet.
        key: the name of the tensor of a part: "A", "B", "bias" or "magnitude".

    Raises:
        TargetError, ShapeError, DTypeError, NonFiniteError: the message names the tensor.
    """
    if pair.kind not in KINDS:
        raise TargetError(f"{path}: expected a kind among {', '.join(KINDS)}, got {pair.kind!r}; correct it")
    _check_factors(pair, rank, key)
    _check_bias(config, pair, key)
    _check_magnitude(config, pair, key)
    scaling = config.scaling_of(path)
    if pair.scaling != scaling:
        raise TargetError(
            f"{path}: scaling is {pair.scaling!r}, the adapter's config says {scaling!r}; use its value"
        )


def _check_factors(pair: LoraPair, rank: int | None, key: Callable[[str], str]) -> None:
    A, B = pair.A, pair.B
    check_dtype(key("A"), A)
    kernel = A.ndim - 2
    stacked = pair.kind == "parameter"
    if rank is None:
        expected, fits = "r", True
    elif stacked:
        expected, fits = f"{rank} * weights", len(A) % rank == 0 if A.ndim else False
    else:
        expected, fits = f"{rank}", len(A) == rank if A.ndim else False
    if not fits or kernel not in ((1, 2, 3) if pair.kind == "convolution" else (0,)) or 0 in A.shape:
        inputs = {"embedding": "V", "convolution": "in, *kernel"}.get(pair.kind, "in")
        raise ShapeError(
            f"{key('A')}: expected shape ({expected}, {inputs}) by the adapter's config, got {A.shape}; "
            f"correct r or rank_pattern"
        )
    check_finite(key("A"), A)
    check_dtype(key("B"), B)
    tail = (len(A), *(1,) * kernel)
    if B.ndim != A.ndim or B.shape[1:] != tail or 0 in B.shape:
        _refuse_groups(pair, key("B"))
        outputs = "d" if pair.kind == "embedding" else "out"
        raise ShapeError(
            f"{key('B')}: expected shape ({', '.join(map(str, (outputs, *tail)))}) by the adapter's "
            f"config, got {B.shape}; correct r or rank_pattern"
        )
    check_finite(key("B"), B)


def _refuse_groups(pair: LoraPair, name: str) -> None:
    """Say of a grouped convolution's B, (out, r / groups, 1, ...), what it is."""
    A, B = pair.A, pair.B
    if (
        pair.kind == "convolution"
        and B.ndim == A.ndim
        and 0 < B.shape[1] < len(A)
        and len(A) % B.shape[1] == 0
    ):
        raise ShapeError(
            f"{name}: {B.shape} is of a convolution in {len(A) // B.shape[1]} groups, whose lora_A sees the "
            f"channels of all groups at once, and no grouped weight can hold that update; train without it"
        )


def _check_bias(config: LoraConfig, pair: LoraPair, key: Callable[[str], str]) -> None:
    if config.lora_bias and pair.kind == "embedding":
        raise TargetError(f"{key('A')}: an embedding has no lora_bias; leave it out of the targets")
    if (pair.bias is not None) != config.lora_bias:
        got = "none" if pair.bias is None else f"shape {pair.bias.shape}"
        raise TargetError(
            f"{key('bias')}: expected {'one' if config.lora_bias else 'none'} by the adapter's config "
            f"(lora_bias {config.lora_bias}), got {got}; config and weights are of different adapters"
        )
    if pair.bias is not None:
        _check_shape(key("bias"), pair.bias, pair.B.shape[:1])


def _check_magnitude(config: LoraConfig, pair: LoraPair, key: Callable[[str], str]) -> None:
    if (pair.magnitude is not None) != config.use_dora:
        got = "none" if pair.magnitude is None else f"shape {pair.magnitude.shape}"
        raise TargetError(
            f"{key('magnitude')}: expected {'one' if config.use_dora else 'none'} by the adapter's config "
            f"(use_dora {config.use_dora}), got {got}; config and weights are of different adapters"
        )
    if pair.magnitude is not None:
        outputs = pair.B.shape[:1]
        spread = (1, *outputs, *(1,) * (pair.A.ndim - 2))
        _check_shape(key("magnitude"), pair.magnitude, spread if pair.kind == "convolution" else outputs)


def _check_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    check_dtype(name, array)
    if array.shape != shape:
        raise ShapeError(f"{name}: expected shape {shape} to fit lora_B, got {array.shape}; check its axes")
    check_finite(name, array)
