"""The LoRA layer of a mixture of experts, whose weights are stacked, forward and backward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, ShapeError
from .formats import Array
from .indices import Indices, check_indices, most_in_one
from .linear import AdapterTerms, LinearTerms, adapter_tensors, layer_gradients
from .linear_shapes import adapter_suffix
from .low_rank import LayerGradients, LowRank
from .operands import Operand, check_dtypes, masked, product, restructure, scale, total


def experts_forward(
    x: Array,
    expert: NDArray[Any],
    W0: Array,
    adapters: Sequence[LowRank],
    *,
    bias: Array | None = None,
    fan_in_fan_out: bool = False,
) -> Array:
    """Return y, (N, out), each row from the expert e that it goes to: with e = expert[n],

        y[n] = x[n] W0[e]^T + bias[e] + sum over adapters of scaling * ((x[n] * dropout[n]) A[e]^T) B[e]^T

    Args:
        x: (N, in), the rows in any order, a token twice where it goes to two experts.
        expert: (N,), integers of any width from 0 to E - 1.
        W0: (E, out, in), frozen; or (E, in, out) with ``fan_in_fan_out``.
        adapters: any number; A is (E, r, in), B is (E, out, r), dropout is (N, in). No bias of lora_B and no
            rows. `expert_factors_from_peft` takes PEFT's tensors to these.
        bias: (E, out).

    Dtypes and source as in `linear_forward`.

    Raises:
        ShapeError, DTypeError, ConfigError: naming the tensor, what was expected and what came; an expert out
            of range is named with its position.
    """
    W0 = as_out_in(W0, fan_in_fan_out)
    rows = check_experts(x, expert, W0, adapters, bias=bias)
    check_dtypes(x=x, W0=W0, **adapter_tensors(adapters), bias=bias)
    y: Array = forward(x, Places.of(rows, len(W0)), W0, adapters, bias)
    return y


def experts_backward(
    dy: Array,
    x: Array,
    expert: NDArray[Any],
    W0: Array,
    adapters: Sequence[LowRank],
    *,
    fan_in_fan_out: bool = False,
) -> LayerGradients:
    """Return the gradients of `experts_forward` for ``dy``, (N, out), the gradient of y.

    dx is (N, in), dbias (E, out), and for each adapter dA is (E, r, in) and dB (E, out, r): for each expert
    those of `linear_backward` on its own rows, zero where it has none.

    Arguments, dtypes and errors as in `experts_forward`.
    """
    W0 = as_out_in(W0, fan_in_fan_out)
    rows = check_experts(x, expert, W0, adapters, dy=dy)
    check_dtypes(x=x, W0=W0, **adapter_tensors(adapters), dy=dy)
    return layer_gradients(*backward(dy, x, Places.of(rows, len(W0)), W0, adapters))


def expert_factors_from_peft(lora_A: Array, lora_B: Array, experts: int) -> tuple[Array, Array]:
    """Return A, (E, r, in), and B, (E, out, r), of the two matrices that PEFT stores for all experts.

    Args:
        lora_A: (E * r, in), the r rows of an expert next to one another.
        lora_B: (out, r * E), the E columns of a rank next to one another.
        experts: E.

    Raises:
        ConfigError: there is no expert.
        ShapeError: what does not fit is named.

    Source: PEFT 0.21.2, ``ParamWrapper.get_delta_weight``.
    """
    if experts < 1:
        raise ConfigError(f"experts: expected 1 or more, got {experts}; it is the first axis of the weight")
    if lora_A.ndim != 2 or lora_A.shape[0] < 1 or lora_A.shape[0] % experts:
        raise ShapeError(
            f"lora_A: expected (r * {experts}, in) for {experts} experts, got {lora_A.shape}; "
            "check their number"
        )
    if lora_B.ndim != 2 or lora_B.shape[1] != lora_A.shape[0]:
        raise ShapeError(
            f"lora_B: expected (out, {lora_A.shape[0]}) to fit lora_A {lora_A.shape}, got {lora_B.shape}; "
            "is it transposed?"
        )
    r = lora_A.shape[0] // experts
    A = lora_A.reshape(experts, r, lora_A.shape[1])
    B = lora_B.reshape(lora_B.shape[0], r, experts).transpose(2, 0, 1)
    return A, B


def check_experts(
    x: Array,
    expert: NDArray[Any],
    W0: Array,
    adapters: Sequence[LowRank],
    *,
    bias: Array | None = None,
    dy: Array | None = None,
) -> Indices:
    """Check shapes, indices and options, W0 as (E, out, in), and return ``expert`` as array indices."""
    if W0.ndim != 3:
        raise ShapeError(f"W0: expected (E, out, in), got {W0.shape}; stack the experts' weights")
    experts, out_features, in_features = W0.shape
    if x.ndim != 2 or x.shape[1] != in_features:
        raise ShapeError(
            f"x: expected (N, {in_features}) to fit W0 {W0.shape}, got {x.shape}; make its leading axes one"
        )
    expected: dict[str, tuple[Array | None, tuple[int, ...]]] = {"expert": (expert, x.shape[:1])}
    for number, adapter in enumerate(adapters):
        suffix = adapter_suffix(number, adapters)
        for name, option in (("bias of lora_B", adapter.bias), ("rows", adapter.rows)):
            if option is not None:
                raise ConfigError(f"{name}{suffix}: expected None, stacked experts have none; leave it out")
        A = adapter.A
        if A.ndim != 3 or (A.shape[0], A.shape[2]) != (experts, in_features) or A.shape[1] < 1:
            raise ShapeError(
                f"A{suffix}: expected ({experts}, r, {in_features}) to fit W0 {W0.shape}, got {A.shape}; "
                "check its axes"
            )
        expected[f"B{suffix}"] = (adapter.B, (experts, out_features, A.shape[1]))
        expected[f"dropout{suffix}"] = (adapter.dropout, x.shape)
    expected["bias"] = (bias, (experts, out_features))
    expected["dy"] = (dy, (len(x), out_features))
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ShapeError(
                f"{name}: expected {shape} to fit W0 {W0.shape} and x {x.shape}, got {tensor.shape}; "
                "check its axes"
            )
    return check_indices("expert", expert, experts, W0)


@dataclass(frozen=True, eq=False)
class Places:
    """Where each row lies when the rows are sorted into a stack, (E, most, ...), by expert.

    ``most`` is the number of rows of the busiest expert; the others' stacks are filled up with zeros, which
    change no sum.
    """

    expert: Indices
    slot: Indices
    experts: int
    most: int

    @staticmethod
    def of(expert: Indices, experts: int) -> "Places":
        """Return the places of rows that go to ``expert``, in their order."""
        slot = np.zeros_like(expert)
        for e in range(experts):
            own = expert == e
            slot[own] = np.arange(np.count_nonzero(own))
        return Places(expert, slot, experts, most_in_one(expert))

    def stack(self, rows: Operand) -> Operand:
        """Return (N, features) as (E, most, features)."""

        def fill(array: Array) -> Array:
            stacked = np.zeros((self.experts, self.most, array.shape[1]), array.dtype)
            stacked[self.expert, self.slot] = array
            return stacked

        return restructure(rows, fill)

    def unstack(self, stacked: Operand) -> Operand:
        """Return (E, most, features) as (N, features)."""
        return restructure(stacked, lambda array: array[self.expert, self.slot])


def forward(
    x: Operand, places: Places, W0: Operand, adapters: Sequence[LowRank], bias: Operand | None
) -> Operand:
    """Evaluate `experts_forward` on operands of any kind, W0 as (E, out, in); nothing is checked."""
    y = places.unstack(product(places.stack(x), _swap(W0)))
    if bias is not None:
        y = y + bias[places.expert]
    for own in adapters:
        h = product(places.stack(masked(x, own.dropout)), _swap(own.A))
        y = y + scale(places.unstack(product(h, _swap(own.B))), own.scaling)
    return y


def backward(
    dy: Operand, x: Operand, places: Places, W0: Operand, adapters: Sequence[LowRank]
) -> LinearTerms:
    """Evaluate `experts_backward` on operands of any kind, W0 as (E, out, in); nothing is checked."""
    stacked = places.stack(dy)
    terms = [_update_backward(stacked, x, places, own) for own in adapters]
    dx = places.unstack(product(stacked, W0))
    for own in terms:
        dx = dx + own.dx
    return LinearTerms(dx, total(restructure(stacked, lambda a: a.swapaxes(0, 1))), terms)


def _update_backward(dy: Operand, x: Operand, places: Places, adapter: LowRank) -> AdapterTerms:
    """Return one adapter's gradients and its share of dx; dy is stacked."""
    dropped = places.stack(masked(x, adapter.dropout))
    h = product(dropped, _swap(adapter.A))
    dh = scale(product(dy, adapter.B), adapter.scaling)
    return AdapterTerms(
        dx=masked(places.unstack(product(dh, adapter.A)), adapter.dropout),
        dA=product(_swap(dh), dropped),
        dB=scale(product(_swap(dy), h), adapter.scaling),
        dbias=None,
    )


def _swap(values: Operand) -> Operand:
    """Return the stack with every matrix transposed."""
    return restructure(values, lambda a: a.swapaxes(-1, -2))


def as_out_in(W0: Array, fan_in_fan_out: bool) -> Array:
    return W0.swapaxes(-1, -2) if fan_in_fan_out and W0.ndim > 1 else W0
