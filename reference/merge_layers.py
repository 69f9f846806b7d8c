"""The merge of every kind of layer but the linear one: its weight seen as matrices, merged as those are.

For a linear layer, in either storage, and a fused projection see `merge_adapters`; for DoRA, `merge_dora`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import DTypeLike

from .convolution import convolution_delta_factors
from .errors import ConfigError, ShapeError
from .formats import Array, float_format
from .linear_shapes import adapter_suffix
from .low_rank import LowRank
from .merge import merge_adapters
from .merge_inputs import check_merge_inputs, check_threads


def merge_embedding(
    W0: Array,
    adapters: Sequence[LowRank],
    *,
    dtype: DTypeLike | None = None,
    out: Array | None = None,
    threads: int | None = None,
    name: str = "W0",
) -> Array:
    """Return ``W0 + scaling * (B @ A)^T``, (V, d): the exact sum over all adapters, rounded once.

    Args:
        W0: (V, d), a row for each token.
        adapters: with A (r, V), the tensor ``lora_embedding_A``, and B (d, r), ``lora_embedding_B``.

    An embedding is a linear layer on one-hot rows whose weight is stored (in, out). The other arguments, and
    what is guaranteed and refused, as for `merge_adapters`. A table that an output layer shares is merged
    once.
    """
    return merge_adapters(W0, adapters, fan_in_fan_out=True, dtype=dtype, out=out, threads=threads, name=name)


def merge_convolution(
    W0: Array,
    adapters: Sequence[LowRank],
    *,
    dtype: DTypeLike | None = None,
    out: Array | None = None,
    threads: int | None = None,
    name: str = "W0",
) -> Array:
    """Return ``W0 + scaling * (B @ A)``, the exact sum over all adapters, rounded once.

    Args:
        W0: (out, in / groups, *kernel), contiguous or not (then a copy of it is made).
        adapters: with A (r, in / groups, *kernel) and B (out, r) or (out, r, 1, ...); the product is
            reshaped to W0's shape. Stride, padding and dilation play no part in a merge.
        out: C-contiguous, of W0's shape.

    The other arguments, and what is guaranteed and refused, as for `merge_adapters`.
    """
    W0 = np.asarray(W0)
    matrices = []
    for adapter in adapters:
        A, B = convolution_delta_factors(adapter, W0.shape)
        matrices.append(replace(adapter, A=A, B=B))
    if out is not None and (out.shape != W0.shape or not out.flags.c_contiguous):
        raise ShapeError(
            f"out of {name}: expected C-contiguous {W0.shape}, got {out.shape} with strides {out.strides}; "
            "allocate it with numpy.empty"
        )
    matrix = W0.reshape(len(W0), math.prod(W0.shape[1:]))
    own = None if out is None else out.reshape(matrix.shape)
    merged = merge_adapters(matrix, matrices, dtype=dtype, out=own, threads=threads, name=name)
    return merged.reshape(W0.shape) if out is None else out


def merge_experts(
    W0: Array,
    adapters: Sequence[LowRank],
    *,
    fan_in_fan_out: bool = False,
    dtype: DTypeLike | None = None,
    out: Array | None = None,
    threads: int | None = None,
    name: str = "W0",
) -> Array:
    """Return ``W0[e] + scaling * B[e] @ A[e]`` for each expert e, summed over adapters, rounded once.

    Args:
        W0: (E, out, in), or (E, in, out) with ``fan_in_fan_out``.
        adapters: with A (E, r, in) and B (E, out, r); see `expert_factors_from_peft`.
        out: of W0's shape.
        name: an expert is called ``name[e]`` in error messages.

    The other arguments, and what is guaranteed and refused, as for `merge_adapters`; all experts' inputs are
    checked before anything is written.
    """
    W0, threads = np.asarray(W0), check_threads(threads)
    if W0.ndim != 3:
        raise ShapeError(f"{name}: expected (E, out, in), got shape {W0.shape}; stack the experts' weights")
    experts = [_of_expert(e, W0, adapters, name) for e in range(len(W0))]
    for e, own in enumerate(experts):
        check_merge_inputs(W0[e], own, dtype, threads, f"{name}[{e}]", fan_in_fan_out=fan_in_fan_out)
    if out is None:
        out = np.empty(W0.shape, float_format(W0.dtype if dtype is None else dtype).dtype)
    elif out.shape != W0.shape:
        raise ShapeError(
            f"out of {name}: expected shape {W0.shape}, got {out.shape}; allocate it in that shape"
        )
    for e, own in enumerate(experts):
        merge_adapters(
            W0[e],
            own,
            fan_in_fan_out=fan_in_fan_out,
            dtype=dtype,
            out=out[e],
            threads=threads,
            name=f"{name}[{e}]",
        )
    return out


def merge_bias(
    bias: Array, adapters: Sequence[LowRank], *, dtype: DTypeLike | None = None, name: str = "bias"
) -> Array:
    """Return ``bias + sum scaling * lora_B's bias``, (out,), on each adapter's rows: exact, rounded once.

    Args:
        bias: (out,), the layer's own; zeros for a layer that has none, and then the merged layer needs one.
        adapters: those without a bias of lora_B add nothing.
        dtype: what to round to; the bias's own by default.

    What is guaranteed and refused, as for `merge_adapters`.
    """
    bias = np.asarray(bias)
    if bias.ndim != 1:
        raise ShapeError(f"{name}: expected (out,), got shape {bias.shape}; pass the bias as a vector")
    columns = []
    for number, adapter in enumerate(adapters):
        if adapter.bias is None:
            continue
        if adapter.bias.ndim != 1:
            what = f"bias of lora_B{adapter_suffix(number, adapters)}"
            raise ShapeError(f"{what}: expected (out,), got shape {adapter.bias.shape}; pass it as a vector")
        columns.append(LowRank(np.ones((1, 1)), adapter.bias[:, None], adapter.scaling, rows=adapter.rows))
    return merge_adapters(bias[:, None], columns, dtype=dtype, threads=1, name=name)[:, 0]


def _of_expert(e: int, W0: Array, adapters: Sequence[LowRank], name: str) -> list[LowRank]:
    """Return the adapters of one expert, once it is certain that there is one for each."""
    own = []
    for number, adapter in enumerate(adapters):
        suffix = adapter_suffix(number, adapters)
        for tensor, what in ((adapter.A, f"lora_A{suffix}"), (adapter.B, f"lora_B{suffix}")):
            if tensor.ndim != 3 or len(tensor) != len(W0):
                raise ShapeError(
                    f"{what} of {name}: expected 3 axes, the first of {len(W0)} experts, got {tensor.shape}; "
                    "stack the experts' factors"
                )
        if adapter.rows is not None:
            raise ConfigError(
                f"rows{suffix} of {name}: expected None for experts, got {adapter.rows}; leave it out"
            )
        own.append(LowRank(adapter.A[e], adapter.B[e], adapter.scaling))
    return own
