"""Adding low-rank updates to the frozen weight, rounded once."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import DTypeLike

from .errors import NonFiniteError
from .factors import Factors
from .formats import Array, first_nonfinite
from .low_rank import LowRank
from .merge_block import BlockMerger
from .merge_inputs import MergeInputs, check_finite, check_merge_inputs, check_out, check_threads
from .rounding import round_to
from .tiles import Position, Tile, first_position, tiles

# A tile is the work that a thread takes at a time; a panel of A in float64 stays in the last-level cache.
_TILE_ENTRIES = 1 << 18
_PANEL_ENTRIES = 1 << 18
_MAX_PANEL_COLUMNS = 1 << 12
_ROWS_OF_B_ENTRIES = 1 << 17


def merge(
    W0: Array,
    A: Array,
    B: Array,
    scaling: float,
    *,
    dtype: DTypeLike | None = None,
    out: Array | None = None,
    threads: int | None = None,
    name: str = "W0",
) -> Array:
    """Return ``W0 + scaling * B @ A``, each entry the exact real value rounded once, ties to even.

    Exact means: over the numbers given. No rounding of the product, of the sum or of ``scaling * B`` can be
    seen in the result, which therefore depends neither on the number of threads nor on the BLAS nor on the
    CPU.

    Args:
        W0: (out, in) frozen weight. W0, A and B may each be float16, bfloat16, float32 or float64, of any
            strides, read-only or memory-mapped.
        A: (r, in), the tensor ``lora_A``.
        B: (out, r), the tensor ``lora_B``.
        scaling: see `lora_scaling`; a float64, taken as exact.
        dtype: what to round to, one of the same four; W0's own by default.
        out: array (out, in) of that dtype to write to, sharing no memory with the inputs. Returned.
        threads: how many to use; one per CPU by default, 8 at most.
        name: what to call W0 in error messages.

    Signed zeros and the ends of the range:
        - an update of exactly zero keeps W0's number, -0.0 included (bit for bit when the dtype is W0's);
        - a sum of exactly zero from a nonzero update is +0;
        - an underflow rounds to a subnormal number or to zero, with the sign of the exact value;
        - an overflow is refused.

    Memory: besides the result less than 64 MiB, whatever the shape, for r up to 16,384.

    Raises:
        DTypeError, ShapeError: an argument's dtype or shape does not fit.
        NonFiniteError: NaN or infinity in an input, or a merged number too large for the dtype.
        ConfigError: ``threads`` below 1; ``out`` read-only or overlapping an input.

    All inputs are checked before anything is written to ``out``. Only an overflow is found later: then
    ``out`` holds a part of the result, and must not be used. A new array is filled while W0 is checked.

    Source: LoRA, arXiv 2106.09685, section 4.1. Ziv, "Fast evaluation of elementary mathematical functions
    with correctly rounded last bit", ACM TOMS 17 (1991), for the way to round correctly.
    """
    adapters = [LowRank(A, B, scaling)]
    return merge_adapters(W0, adapters, dtype=dtype, out=out, threads=threads, name=name)


def merge_adapters(
    W0: Array,
    adapters: Sequence[LowRank],
    *,
    fan_in_fan_out: bool = False,
    dtype: DTypeLike | None = None,
    out: Array | None = None,
    threads: int | None = None,
    name: str = "W0",
) -> Array:
    """Return W0 plus every adapter's ``scaling * B @ A`` on its rows: the exact sum, rounded once in all.

    Several adapters merged in turn are rounded once each; here the sum of all is. A weighted sum of adapters
    has each one's weight in its scaling. A fused projection has an adapter for each slice, see
    `fused_adapters`.

    Args:
        W0: (out, in), or (in, out) with ``fan_in_fan_out``; out and the result are as W0 is.
        adapters: any number. A bias of lora_B belongs to `merge_bias`; dropout plays no part in a merge.

    The other arguments, signed zeros, memory, errors and source as for `merge`.
    """
    threads = check_threads(threads)
    inputs = check_merge_inputs(
        W0, adapters, dtype, threads, name, fan_in_fan_out=fan_in_fan_out, read_W0=out is not None
    )
    if out is None:
        out = np.empty(inputs.W0.shape, inputs.target.dtype)
    check_out(out, inputs, name)
    overflow = _write_merged(inputs, out, threads, fan_in_fan_out)
    if overflow is not None:
        raise overflow_error(inputs, overflow, threads, name)
    return out


def overflow_error(inputs: MergeInputs, position: Position, threads: int, name: str) -> NonFiniteError:
    """Return the error for a merge that has an infinity or NaN there.

    Raises:
        NonFiniteError: W0 has one itself.
    """
    check_finite(inputs.W0, name, threads)
    return NonFiniteError(
        f"{name}: expected merged numbers of magnitude {inputs.target.largest:.5g} at most "
        f"({inputs.target.dtype}), got an overflow at {list(position)}; merge to a wider dtype"
    )


def _write_merged(inputs: MergeInputs, out: Array, threads: int, fan_in_fan_out: bool) -> Position | None:
    """Write the merged weight into ``out``; return the first position that overflows."""
    found = []
    for factors in inputs.ranges:
        rows = slice(factors.start, factors.stop)
        own = (slice(None), rows) if fan_in_fan_out else (rows, slice(None))
        given = factors.T if fan_in_fan_out else factors
        overflow = _write_range(inputs, given, inputs.W0[own], out[own], threads)
        if overflow is not None:
            i, j = overflow
            found.append((i, j + factors.start) if fan_in_fan_out else (i + factors.start, j))
    return min(found, default=None)


def _write_range(
    inputs: MergeInputs, factors: Factors, W0: Array, out: Array, threads: int
) -> Position | None:
    """Write one range of the weight, given as it is stored, and its factors with it."""
    shape = (W0.shape[0], W0.shape[1])
    if factors.is_zero:
        work = tiles(shape, _TILE_ENTRIES, _TILE_ENTRIES)
        return first_position(work, threads, lambda: partial(_write_rounded, W0, out))
    work = merge_tiles(shape, factors.r)
    mergers: list[BlockMerger] = []

    def make_worker() -> Callable[[Tile], None]:
        mergers.append(BlockMerger(factors, W0, inputs.largest, out, inputs.target))
        return mergers[-1].merge

    first_position(work, threads, make_worker)
    found = [merger.finish() for merger in mergers]
    return min((position for position in found if position is not None), default=None)


def merge_tiles(shape: tuple[int, int], r: int) -> list[Tile]:
    """Cut a weight so that a tile's columns of A, and its rows of B, are of bounded size for any rank r."""
    columns = min(_MAX_PANEL_COLUMNS, max(_PANEL_ENTRIES // (16 * r), 1) * 16)
    rows = max(1, min(_TILE_ENTRIES // columns, _ROWS_OF_B_ENTRIES // r))
    return tiles(shape, columns * rows, columns)


def _write_rounded(W0: Array, out: Array, tile: Tile) -> Position | None:
    out[tile] = round_to(W0[tile], out.dtype)
    return first_nonfinite(out[tile])
