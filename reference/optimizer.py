"""AdamW, the learning rates of LoRA+, and clipping by the global norm, as pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import ConfigError, NonFiniteError, ShapeError
from .formats import Array, float_format, nonfinite_mask
from .operands import check_dtypes, scale

CLIP_EPS = 1e-6
"""What `clip_by_global_norm` adds to the norm that it divides by."""


@dataclass(frozen=True)
class AdamWOptions:
    """The numbers that AdamW is steered by, float64 each and taken as exact; defaults are torch's.

    Args:
        lr: learning rate, at least 0.
        betas: how much of the gradients' mean and of their squares' mean is kept each step; each at least 0
            and below 1.
        eps: what is added to the root that is divided by, at least 0.
        weight_decay: a step first multiplies the parameter by ``1 - lr * weight_decay``; at least 0.

    Raises:
        ConfigError: a number out of range.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name}: expected a finite number of at least 0, got {value}; correct it")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"betas: expected two numbers of at least 0 and below 1, got {self.betas}; correct them"
            )


@dataclass(frozen=True, eq=False)
class AdamWState:
    """What AdamW remembers of a parameter: steps taken, and running means of gradients and their squares.

    m and v have the parameter's shape and dtype; they are torch's ``exp_avg`` and ``exp_avg_sq``.
    """

    step: int
    m: Array
    v: Array


def adamw_start(parameter: Array) -> AdamWState:
    """Return the state before the first step: m and v zero."""
    return AdamWState(0, np.zeros_like(parameter), np.zeros_like(parameter))


def adamw_step(
    parameter: Array, gradient: Array, state: AdamWState, options: AdamWOptions
) -> tuple[Array, AdamWState]:
    """Return the parameter and the state after one step; nothing is changed in place.

    With t = step + 1, all operations elementwise:

        m_t = b1 m + (1 - b1) g,   v_t = b2 v + (1 - b2) g^2
        p_t = (1 - lr wd) p - lr / (1 - b1^t) * m_t / (sqrt(v_t) / sqrt(1 - b2^t) + eps)

    The scalars are computed in float64 as ``torch.optim.AdamW`` does; everything else, and they before they
    are used, in the parameter's dtype: one evaluation among many, see `adamw_step_bound`.

    Args:
        parameter, gradient, state.m, state.v: of one shape and one of the four floating-point dtypes.

    Raises:
        ShapeError, DTypeError: a tensor does not fit the parameter.
        ConfigError: ``state.step`` is no count of steps, or v is negative somewhere.
        NonFiniteError: NaN or infinity in an input, or in the result: squares of gradients that overflow, or
            a denominator of zero, where eps is 0 or rounds to it.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv 1711.05101, algorithm 2,
    with the learning rate in the decay as in torch; Kingma and Ba, arXiv 1412.6980, algorithm 1.
    """
    check_adamw(parameter, gradient, state)
    (beta1, beta2), t = options.betas, state.step + 1
    number = parameter.dtype.type
    with np.errstate(all="ignore"):  # what overflows is refused below
        m = scale(state.m, beta1) + scale(gradient, 1.0 - beta1)
        v = scale(state.v, beta2) + scale(gradient, 1.0 - beta2) * gradient
        denominator = np.sqrt(v) / number(math.sqrt(1.0 - beta2**t)) + number(options.eps)
        update = scale(m / denominator, options.lr / (1.0 - beta1**t))
        moved: Array = scale(parameter, 1.0 - options.lr * options.weight_decay) - update
    remedy = "raise eps, or keep the parameter in a wider dtype"
    _check_finite("parameter after the step", moved, remedy)
    _check_finite("v after the step", v, remedy)
    return moved, AdamWState(t, m, v)


def check_adamw(parameter: Array, gradient: Array, state: AdamWState) -> None:
    """Check the tensors of a step; errors as in `adamw_step`."""
    tensors = {"parameter": parameter, "gradient": gradient, "m": state.m, "v": state.v}
    float_format(parameter.dtype, "parameter")
    check_dtypes(**tensors)
    for name, tensor in tensors.items():
        if tensor.shape != parameter.shape:
            raise ShapeError(f"{name}: expected {parameter.shape} as parameter has, got {tensor.shape}")
        _check_finite(name, tensor, "correct what it came from")
    if isinstance(state.step, bool) or not hasattr(state.step, "__index__") or state.step < 0:
        raise ConfigError(f"step: expected an integer of at least 0, got {state.step!r}; use adamw_start")
    if (state.v < 0).any():
        raise ConfigError("v: expected no number below 0, for it averages squares; are m and v exchanged?")


@dataclass(frozen=True)
class LoraPlusRates:
    """Learning rates of ``lora_A``, of ``lora_B``, and of both matrices of an adapter on an embedding."""

    A: float
    B: float
    embedding: float


def loraplus_rates(lr: float, ratio: float, embedding: float = 1e-6) -> LoraPlusRates:
    """Return LoRA+'s learning rates: A learns at ``lr``, B at ``ratio * lr``, embeddings at ``embedding``.

    As PEFT's ``create_loraplus_optimizer`` groups parameters: B's group also takes every trainable vector
    (biases, DoRA's magnitudes); A's takes every other matrix. The weight decay is one number for all, 0 by
    default, but that vectors with "bias" in their name have none.

    Args:
        lr, embedding: finite, at least 0.
        ratio: finite, at least 0; 1 is plain LoRA, and the paper recommends more.

    Raises:
        ConfigError: a number out of range.

    Source: LoRA+, arXiv 2402.12354; PEFT, ``peft/optimizers/loraplus.py``.
    """
    for name, value in {"lr": lr, "ratio": ratio, "embedding": embedding}.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name}: expected a finite number of at least 0, got {value}; correct it")
    return LoraPlusRates(A=lr, B=lr * ratio, embedding=embedding)


def clip_by_global_norm(gradients: Sequence[Array], max_norm: float) -> tuple[tuple[Array, ...], float]:
    """Return the gradients times ``min(1, max_norm / (norm + 1e-6))``, and norm, that of all of them as one.

    As ``torch.nn.utils.clip_grad_norm_`` with the 2-norm. The norm and the factor are computed in float64;
    the factor is rounded to a gradient's dtype and multiplied in it.

    Args:
        gradients: any number, of any shapes and of the four floating-point dtypes.
        max_norm: at least 0; infinite to clip nothing.

    Raises:
        DTypeError: a gradient is of another dtype.
        ConfigError: ``max_norm`` is negative or NaN.
        NonFiniteError: NaN or infinity in a gradient, or a norm that float64 cannot square.

    Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", arXiv
    1211.5063, algorithm 1; the 1e-6 is torch's.
    """
    if not max_norm >= 0:
        raise ConfigError(f"max_norm: expected a number of at least 0, got {max_norm}; correct it")
    squares = 0.0
    for number, gradient in enumerate(gradients):
        float_format(gradient.dtype, f"gradient {number}")
        _check_finite(f"gradient {number}", gradient, "skip this step")
        with np.errstate(over="ignore"):
            squares += float(np.square(gradient, dtype=np.float64).sum())
    if squares == math.inf:
        raise NonFiniteError(
            "norm: expected a finite sum of squares, got an overflow; scale the gradients down"
        )
    norm = math.sqrt(squares)
    factor = min(1.0, max_norm / (norm + CLIP_EPS))
    return tuple(scale(gradient, factor) for gradient in gradients), norm


def _check_finite(name: str, values: Array, remedy: str) -> None:
    wrong = np.argwhere(nonfinite_mask(values))
    if len(wrong):
        position = tuple(wrong[0])
        raise NonFiniteError(
            f"{name}: expected finite numbers, got {float(values[position])} at {wrong[0].tolist()}; {remedy}"
        )
