"""Merging a DoRA adapter into the frozen weight: every row rescaled to its magnitude, rounded once."""

import numpy as np
from numpy.typing import DTypeLike

from .dora_block import BandMerger
from .dora_entries import exact_dora_entry, exact_merged, exact_square
from .errors import ConfigError, NonFiniteError, ShapeError
from .formats import Array, float_format, nonfinite_mask
from .low_rank import LowRank
from .merge_inputs import check_merge_inputs, check_out, check_threads
from .tiles import first_position, tiles

# A band of whole rows is the work that a thread takes at a time.
_BAND_ENTRIES = 1 << 16
_ROWS_OF_B_ENTRIES = 1 << 17


def merge_dora(
    W0: Array,
    A: Array,
    B: Array,
    scaling: float,
    magnitude: Array,
    *,
    dtype: DTypeLike | None = None,
    out: Array | None = None,
    threads: int | None = None,
    name: str = "W0",
) -> Array:
    """Return ``magnitude[i] * w[i, j] / ||w[i]||_2`` with ``w = W0 + scaling * B @ A``, rounded once.

    Correctly rounded, ties to even, for all four dtypes: the result is the number of the dtype next to the
    exact real value over the numbers given, and depends on neither threads, BLAS nor processor. Narrower
    dtypes are settled almost everywhere in float64; float64 takes arithmetic of 106 bits for every entry, and
    many times as long.

    Args:
        W0: (out, in) frozen weight, the norm being over its second axis. For other weights pass the view of
            which that is true, as `dora_norm` has it: ``W0.T`` with fan_in_fan_out and for embeddings,
            ``W0.reshape(out, -1)`` for convolutions. Any strides, read-only or memory-mapped.
        A: (r, in), the tensor ``lora_A``. B: (out, r), the tensor ``lora_B``.
        scaling: a float64, taken as exact.
        magnitude: (out,), PEFT's ``lora_magnitude_vector``; may be negative or zero. Each of the four tensors
            may be float16, bfloat16, float32 or float64.
        dtype: what to round to, one of the same four; W0's own by default.
        out: array (out, in) of that dtype to write to, sharing no memory with the inputs. Returned.
        threads: how many to use; one per CPU by default, 8 at most.
        name: what to call W0 in error messages.

    Signed zeros and the ends of the range:
        - an exact zero is +0, whatever the signs of the weight and of the magnitude;
        - an underflow rounds to a subnormal number or to zero, with the sign of the exact value;
        - an overflow and a row whose norm is exactly zero are refused.

    Memory: besides the result less than 64 MiB, whatever the shape, for r up to 16,384.

    Raises:
        DTypeError, ShapeError: an argument's dtype or shape does not fit.
        NonFiniteError: NaN or infinity in an input, a norm of zero, or a merged number too large for the
            dtype.
        ConfigError: ``threads`` below 1; ``out`` read-only or overlapping an input.

    Every input is checked before anything is written to ``out``. Only a norm of zero and an overflow are
    found later: then ``out`` holds a part of the result, and must not be used.

    Source: DoRA, arXiv 2402.09353, equation 5. Ziv, ACM TOMS 17 (1991), for the way to round correctly.
    """
    threads = check_threads(threads)
    W0, A, B, magnitude = (np.asarray(tensor) for tensor in (W0, A, B, magnitude))
    inputs = check_merge_inputs(W0, [LowRank(A, B, scaling)], dtype, threads, name)
    _check_magnitude(magnitude, W0.shape, f"magnitude of {name}")
    if out is None:
        out = np.empty(W0.shape, inputs.target.dtype)
    else:
        check_out(out, inputs, name)
        if np.may_share_memory(out, magnitude):
            raise ConfigError(
                f"out of {name}: expected memory of its own, got the magnitude's; pass a new array"
            )
    columns, r = W0.shape[1], A.shape[0]
    entries = max(columns, min(_BAND_ENTRIES, columns * max(1, _ROWS_OF_B_ENTRIES // r)))
    merger = BandMerger(W0, A, B, float(scaling), magnitude, out)
    failure = first_position(tiles(W0.shape, entries, columns), threads, lambda: merger.merge)
    if failure is None:
        return out
    if exact_square(W0[failure[0]], A, B[failure[0]], float(scaling)) == 0:
        raise NonFiniteError(
            f"{name}: expected rows of W0 + scaling * B A with a norm above 0, got zeros in row "
            f"{failure[0]}; such a row has no direction for DoRA to keep"
        )
    raise NonFiniteError(
        f"{name}: expected merged numbers of magnitude {inputs.target.largest:.5g} at most "
        f"({inputs.target.dtype}), got an overflow at {list(failure)}; merge to a wider dtype"
    )


def merge_dora_exact(
    W0: Array, A: Array, B: Array, scaling: float, magnitude: Array, dtype: DTypeLike
) -> Array:
    """Return the DoRA merge entry by entry in rational arithmetic, rounded once to ``dtype``.

    The definition of `merge_dora`, thousands of times slower and without its checks: an oracle for tests.
    Arguments as there; all finite, no norm zero. An overflow is an infinity here.
    """
    merged = np.empty(W0.shape, float_format(dtype).dtype)
    for i, row in enumerate(W0):
        square = exact_square(row, A, B[i], scaling)
        for j, w in enumerate(row):
            merged[i, j] = exact_dora_entry(
                exact_merged(w, B[i], A[:, j], scaling), square, magnitude[i], dtype
            )
    return merged


def _check_magnitude(magnitude: Array, weight: tuple[int, ...], name: str) -> None:
    float_format(magnitude.dtype, name)
    if magnitude.shape != weight[:1]:
        raise ShapeError(
            f"{name}: expected {weight[:1]} to fit a weight {weight}, got {magnitude.shape}; flatten it"
        )
    bad = np.flatnonzero(nonfinite_mask(magnitude))
    if bad.size:
        value = float(magnitude[bad[0]])
        raise NonFiniteError(f"{name}: expected finite numbers, got {value} at [{bad[0]}]; fetch it again")
