"""How far from its exact value an attention block computed in floating point may be, before it is made.

Componentwise a-priori bounds, by `Ball` arithmetic along the definition of `attention_forward` and
`attention_backward`, from the inputs alone. A projection is bounded as in `adapted_linear_forward_bound`,
which covers every order of the factors of LoRA, plus what the error of its input becomes in it. Softmax is
bounded by how far the probabilities can move when each score moves within its radius, see `softmax_ball`.

Covered: any order of summation in each product; the scale applied to the scores or to query and key, at once
or as its root to each; probabilities that are normalised before or after they are multiplied with the values;
softmax in one pass over blocks of at least 16 keys, with rescaling; the backward pass with stored
probabilities or with ``exp(scores - log sum exp)``, and with ``rowsum(P * dP)`` or ``rowsum(dc * c)``;
exponentials of base 2. Not covered: overflow, products in fewer bits than `Precision` says, an exponential
that is less accurate than said.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import DTypeLike

from . import linear
from .attention import Attended, attend, attend_backward, signed_tables
from .attention_inputs import (
    Attention,
    AttentionGradients,
    Projection,
    ProjectionGradients,
    Projections,
    Rotary,
    attended,
    check_attention_shapes,
)
from .balls import Ball
from .bounds import gradient_bounds, sized, slack
from .errors import ConfigError
from .formats import Array
from .low_rank import LowRank, LowRankGradients
from .magnitudes import Bound, magnitude_of, underflow_unit
from .operands import Operand
from .precision import ROUND_UP, Precision
from .softmax import weighted
from .softmax_bounds import EXP_ULPS, softmax_ball


def attention_forward_bound(
    x: Array,
    projections: Projections,
    attention: Attention,
    precision: Precision | DTypeLike,
    *,
    rotary: Rotary | None = None,
    mask: Array | None = None,
    exp_ulps: float = EXP_ULPS,
) -> Bound:
    """Return a bound, (N, T, d), on ``|computed - exact|`` of `attention_forward` evaluated in ``precision``.

    Args:
        x, projections, attention, rotary, mask: as in `attention_forward`, the exact values, in any float
            dtypes. Those that need not be numbers of the dtype count as rounded to it first.
        precision: a dtype, or a `Precision` where products are summed in another or in fewer bits.
        exp_ulps: the largest error of the exponential, in units of the last place of the dtype, beside the
            rounding of its argument; 20 for torch's fused kernels on a CPU.

    Raises:
        ShapeError: a tensor does not fit.
        DTypeError: a dtype is not float16, bfloat16, float32 or float64.
        ConfigError: so many terms in so few bits that there is no bound; a precision with ``failure``, or
            ``exp_ulps`` below 1.
    """
    inputs = _Inputs(x, projections, attention, precision, rotary, mask, exp_ulps)
    bound: Bound = inputs.project(inputs.attend().context, projections.o).bound
    return bound


def attention_backward_bound(
    dy: Array,
    x: Array,
    projections: Projections,
    attention: Attention,
    precision: Precision | DTypeLike,
    *,
    rotary: Rotary | None = None,
    mask: Array | None = None,
    exp_ulps: float = EXP_ULPS,
) -> AttentionGradients:
    """Return bounds on ``|computed - exact|`` of `attention_backward`, in the places of the gradients.

    Arguments and errors as in `attention_forward_bound`.
    """
    inputs = _Inputs(x, projections, attention, precision, rotary, mask, exp_ulps, dy)
    forward = inputs.attend()
    dcontext, output = inputs.project_backward(inputs.ball(dy), forward.context, projections.o)
    dheads = attend_backward(dcontext, forward, attention, inputs.tables, _either_mean)
    dx: list[Ball] = []
    bounds: list[ProjectionGradients] = []
    for dhead, own in zip(dheads, (projections.q, projections.k, projections.v), strict=True):
        share, gradients = inputs.project_backward(dhead, inputs.x, own)
        dx.append(share)
        bounds.append(gradients)
    return AttentionGradients((dx[0] + dx[1] + dx[2]).bound, bounds[0], bounds[1], bounds[2], output)


def _either_mean(dprobabilities: Ball, probabilities: Ball, dhead: Ball, head: Ball) -> Ball:
    """Return ``rowsum(P * dP)``, which is ``rowsum(dc * c)`` where the probabilities are not stored."""
    mean: Ball = weighted(dprobabilities, probabilities).or_else(weighted(dhead, head))
    return mean


class _Inputs:
    """The inputs of a block as balls, and the operations on a whole projection."""

    def __init__(
        self,
        x: Array,
        projections: Projections,
        attention: Attention,
        precision: Precision | DTypeLike,
        rotary: Rotary | None,
        mask: Array | None,
        exp_ulps: float,
        dy: Array | None = None,
    ) -> None:
        check_attention_shapes(x, projections, attention, rotary, dy=dy)
        self.precision = Precision.of(precision)
        if self.precision.failure is not None:
            raise ConfigError(
                f"failure: expected None, got {self.precision.failure}; errors that pass softmax are not "
                "independent"
            )
        if not exp_ulps >= 1:
            raise ConfigError(f"exp_ulps: expected 1 or more, got {exp_ulps}; no exponential is better")
        scalings = [adapter.scaling for own in projections for adapter in own.adapters]
        self.unit = underflow_unit(self.precision.form, attention.score_scale, *scalings)
        self.x = self.ball(x)
        tables = signed_tables(rotary)
        self.tables = None if tables is None else (self.ball(tables[0]), self.ball(tables[1]))
        self.projections, self.attention, self.exp_ulps = projections, attention, exp_ulps
        self.counts = attended(mask, attention.causal, (len(x), attention.heads, x.shape[1], x.shape[1]))

    def ball(self, values: Array) -> Ball:
        return Ball.of(values, self.precision, self.unit)

    def size(self, values: Array | None) -> Operand:
        return None if values is None else magnitude_of(values, self.precision, self.unit)

    def attend(self) -> Attended:
        own = self.projections
        q, k, v = (self.project(self.x, projection) for projection in (own.q, own.k, own.v))
        return attend(
            q,
            k,
            v,
            self.attention,
            self.tables,
            lambda scores: softmax_ball(scores, self.counts, self.exp_ulps),
        )

    def project(self, x: Ball, own: Projection) -> Ball:
        """Return the projection: what the error of x becomes in it, plus the error of projecting what
        came.
        """
        W0, adapters = own.W0.astype(np.float64), sized(own.adapters, _wide)
        centre = linear.forward(x.centre, W0, adapters, _wide(own.bias))
        unbiased = [replace(adapter, bias=None) for adapter in _sizes(adapters)]
        spread = linear.forward(x.radius, np.abs(W0), unbiased, None)
        computed = linear.forward(
            x.magnitude, self.size(own.W0), sized(own.adapters, self.size), self.size(own.bias)
        )
        rounding = computed.bound(slack(own.adapters))
        return replace(x, centre=centre, radius=spread + rounding)

    def project_backward(self, dy: Ball, x: Ball, own: Projection) -> tuple[Ball, ProjectionGradients]:
        """The gradient of a projection's input, and bounds of its other gradients.

        They are bilinear in dy and x: each error times the size of the other.
        """
        W0, adapters = own.W0.astype(np.float64), sized(own.adapters, _wide)
        sizes = _sizes(adapters)
        centre = linear.backward(dy.centre, x.centre, W0, adapters).dx
        from_dy = linear.backward(dy.radius, x.reach, np.abs(W0), sizes)
        from_x = linear.backward(dy.size, x.radius, np.abs(W0), sizes).adapters
        computed = linear.backward(
            dy.magnitude, x.magnitude, self.size(own.W0), sized(own.adapters, self.size)
        )
        rounding = gradient_bounds(computed.dx, computed.dbias, computed.adapters, slack(own.adapters))
        dx = replace(dy, centre=centre, radius=from_dy.dx + rounding.dx)
        gradients = tuple(
            _both(r, a, b) for r, a, b in zip(rounding.adapters, from_dy.adapters, from_x, strict=True)
        )
        return dx, ProjectionGradients(_up(rounding.dbias + from_dy.dbias), gradients)


def _wide(values: Array | None) -> Array | None:
    return None if values is None else values.astype(np.float64)


def _sizes(adapters: Sequence[LowRank]) -> list[LowRank]:
    """Return the adapters with every number replaced by its magnitude."""
    sizes = sized(adapters, lambda values: None if values is None else np.abs(values))
    return [replace(own, scaling=abs(own.scaling)) for own in sizes]


def _both(
    rounding: LowRankGradients, from_dy: linear.AdapterTerms, from_x: linear.AdapterTerms
) -> LowRankGradients:
    return LowRankGradients(
        _up(rounding.dA + from_dy.dA + from_x.dA),
        _up(rounding.dB + from_dy.dB + from_x.dB),
        None if rounding.dbias is None else _up(rounding.dbias + from_dy.dbias),
    )


def _up(bound: Bound) -> Bound:
    """Return the bound rounded up by more than float64 has lost in it."""
    rounded: Bound = bound * ROUND_UP
    return rounded
