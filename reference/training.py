"""What k training steps of an adapter are: forward, backward and AdamW, one after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .errors import ConfigError, ShapeError
from .formats import Array
from .linear import linear_backward, linear_forward
from .operands import check_dtypes, scale
from .optimizer import AdamWOptions, AdamWState, adamw_start, adamw_step, loraplus_rates


@dataclass(frozen=True, eq=False)
class AdapterTraining:
    """What one training step hands to the next: A (r, in), B (out, r), and the optimizer's state of each."""

    A: Array
    B: Array
    state_A: AdamWState  # noqa: N815
    state_B: AdamWState  # noqa: N815


def training_start(A: Array, B: Array) -> AdapterTraining:
    """Return A and B before the first step."""
    return AdapterTraining(A, B, adamw_start(A), adamw_start(B))


def adapter_step(
    training: AdapterTraining, dA: Array, dB: Array, options: AdamWOptions, loraplus_ratio: float = 1.0
) -> AdapterTraining:
    """Return A and B after one step of AdamW each, from their gradients dA (r, in) and dB (out, r).

    B learns at ``loraplus_ratio * options.lr``, see `loraplus_rates`; all other options are shared. Gradients
    of several micro-batches are added up, and clipped, before they come here.

    Errors as in `adamw_step` and `loraplus_rates`.
    """
    faster = replace(options, lr=loraplus_rates(options.lr, loraplus_ratio).B)
    A, state_A = adamw_step(training.A, dA, training.state_A, options)
    B, state_B = adamw_step(training.B, dB, training.state_B, faster)
    return AdapterTraining(A, B, state_A, state_B)


def train_linear(
    training: AdapterTraining,
    x_batches: Sequence[Array],
    dy_of: Callable[[Array, int], Array],
    W0: Array,
    scaling: float,
    options: AdamWOptions,
    *,
    loraplus_ratio: float = 1.0,
    bias: Array | None = None,
    dropouts: Sequence[Array] | None = None,
) -> AdapterTraining:
    """Return what ``len(x_batches)`` training steps of a linear layer make of an adapter.

    Step k: ``y = linear_forward(x_batches[k], ...)``, ``dy = dy_of(y, k)``, then `linear_backward` and
    `adapter_step`. Both matrices move at once, from gradients at the same point; W0 and bias are frozen.

    Args:
        training: from `training_start`, or from earlier steps.
        x_batches: a batch (..., in) for each step.
        dy_of: takes y (..., out) and k, and returns the gradient of the loss with respect to y; for example
            ``lambda y, k: squared_error_gradient(y, targets[k])``.
        W0, scaling, bias: as in `linear_forward`.
        options, loraplus_ratio: as in `adapter_step`.
        dropouts: for each step what to multiply the adapter's input by, see `linear_forward`.

    Errors as in `linear_forward`, `linear_backward` and `adapter_step`.

    Raises:
        ConfigError: ``dropouts`` is not one for each batch.
    """
    if dropouts is not None and len(dropouts) != len(x_batches):
        raise ConfigError(
            f"dropouts: expected one for each of the {len(x_batches)} batches, got {len(dropouts)}; give all"
        )
    for k, x in enumerate(x_batches):
        dropout = None if dropouts is None else dropouts[k]
        y = linear_forward(x, W0, training.A, training.B, scaling, bias=bias, dropout=dropout)
        gradients = linear_backward(dy_of(y, k), x, W0, training.A, training.B, scaling, dropout=dropout)
        training = adapter_step(training, gradients.dA, gradients.dB, options, loraplus_ratio)
    return training


def squared_error_gradient(y: Array, target: Array) -> Array:
    """Return ``2 (y - target) / n``, the gradient of the mean of the n squared errors with respect to y.

    Args:
        y, target: of one shape and dtype; the loss is ``torch.nn.functional.mse_loss(y, target)``.

    Raises:
        ShapeError, DTypeError: naming the tensor, what was expected and what came.
    """
    check_dtypes(y=y, target=target)
    if target.shape != y.shape:
        raise ShapeError(f"target: expected {y.shape} as y has, got {target.shape}; check its axes")
    gradient: Array = scale(y - target, 2.0 / y.size)
    return gradient
