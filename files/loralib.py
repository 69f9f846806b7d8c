"""Adapters trained with Microsoft's loralib, from the arrays of their state dicts.

Source: loralib 0.1.2, ``layers.py`` and ``utils.py``.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.reference import ConfigError, FileError, ShapeError, TargetError, fused_adapters

from .adapter import Adapter
from .config import LoraConfig
from .lora_pair import LoraPair, check_dtype
from .matching import matches

Array = NDArray[Any]

_PARTS = {".lora_A": "A", ".lora_B": "B"}


def adapter_from_loralib(
    state: Mapping[str, Array],
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    fan_in_fan_out: bool = False,
    enable_lora: Mapping[str, Sequence[bool]] | None = None,
    embeddings: Sequence[str] = (),
    convolutions: Sequence[str] = (),
) -> Adapter:
    """Return the adapter in a state dict of ``loralib.lora_state_dict(model)``.

    A state dict has the tensors ``<module>.lora_A`` and ``<module>.lora_B``, and neither the kinds of the
    layers nor r and alpha; these are arguments. Each pair is exact:

    - Linear and Embedding: the tensors as they are.
    - MergedLinear: r ranks for each of n enabled slices become one pair of rank r * n, with each slice's B on
      its own rows and ranks. A slice that is not enabled has rows of zeros.
    - Conv2d, with kernel k x k: ``(B @ A).view(weight.shape)`` of A (r * k, in * k) and B (out * k, r * k)
      becomes one pair of rank r * k * k, with k copies of A along its diagonal.

    The configuration names each module by its whole path, and gives the wider ranks an alpha as many times
    larger, so that the scaling is loralib's alpha / r throughout (within an ulp, where alpha is no integer).

    Trained biases (``bias="all"`` and ``"lora_only"``) become whole tensors. A bias of a Conv2d is called as
    in the plain convolution, without the component ``conv``.

    Args:
        state: name to array: nothing but tensors of ``lora_`` and biases. Base weights are refused: loralib
            merges into them in ``eval()``, so a state dict saved then holds them merged, which its numbers do
            not tell; the adapter belongs to the weights from before.
        r, lora_alpha, lora_dropout, fan_in_fan_out: what the layers were made with.
        enable_lora: the flags of each MergedLinear, by a module's path or its last components.
        embeddings, convolutions: the names, likewise, of the layers of these types.

    Raises:
        FileError: a tensor is not understood, or one of a pair is missing.
        ConfigError: an argument is wrong, names no module, or a module twice.
        TargetError, ShapeError, DTypeError, NonFiniteError: as for `Adapter`.
    """
    flags = {name: tuple(own) for name, own in (enable_lora or {}).items()}
    factors, biases = _split(state)
    _check_names(factors, [*flags, *embeddings, *convolutions])
    made: dict[str, tuple[Array, Array, str]] = {}
    for path, (A, B) in factors.items():
        own = next((value for name, value in flags.items() if matches(path, (name,))), None)
        if own is not None:
            made[path] = (*_merged_linear(path, A, B, own), "linear")
        elif matches(path, convolutions):
            made[path] = (*_convolution(path, A, B, r), "convolution")
        else:
            made[path] = (A, B, "embedding" if matches(path, embeddings) else "linear")
    widths = {path: len(A) // r for path, (A, _, _) in made.items() if len(A) > r and len(A) % r == 0}
    tensors = {_bias_name(name, convolutions): array for name, array in biases.items()}
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=tuple(made),
        rank_pattern={_exactly(path): r * width for path, width in widths.items()},
        alpha_pattern={_exactly(path): _alpha(r, lora_alpha, width) for path, width in widths.items()},
        fan_in_fan_out=fan_in_fan_out,
        bias=_bias(tensors, made),
        task_type=None,
    )
    pairs = {path: LoraPair(A, B, config.scaling_of(path), kind) for path, (A, B, kind) in made.items()}
    return Adapter(config, pairs, tensors)


def _split(state: Mapping[str, Array]) -> tuple[dict[str, tuple[Array, Array]], dict[str, Array]]:
    parts: dict[str, dict[str, Array]] = {}
    biases: dict[str, Array] = {}
    for name, array in sorted(state.items()):
        path, part = next(
            ((name.removesuffix(end), part) for end, part in _PARTS.items() if name.endswith(end)), ("", "")
        )
        if path:
            parts.setdefault(path, {})[part] = array
        elif name.endswith(".bias"):
            biases[name] = array
        else:
            raise FileError(
                f"tensor {name} is not understood, expected <module>.lora_A, <module>.lora_B and biases; "
                f"keep what loralib.lora_state_dict(model) returns"
            )
    for path, own in parts.items():
        for part in ("A", "B"):
            if part not in own:
                raise FileError(f"{path}.lora_{part} is missing; was the state dict complete?")
            check_dtype(f"{path}.lora_{part}", own[part])
            if own[part].ndim != 2:
                raise ShapeError(
                    f"{path}.lora_{part}: expected a matrix, got shape {own[part].shape}; is it of loralib?"
                )
    if not parts:
        raise TargetError("the state dict has no lora_A and lora_B; was it saved before it was trained?")
    return {path: (own["A"], own["B"]) for path, own in parts.items()}, biases


def _check_names(factors: Mapping[str, object], names: Sequence[str]) -> None:
    """Check that every name is of a module, and no module is of two types."""
    for name in names:
        if not any(matches(path, (name,)) for path in factors):
            raise ConfigError(
                f"{name}: expected the name of a module with lora_A, got none; correct the name"
            )
    for path in factors:
        own = [name for name in names if matches(path, (name,))]
        if len(own) > 1:
            raise ConfigError(f"{path}: expected one name for it, got {', '.join(own)}; leave the others out")


def _merged_linear(path: str, A: Array, B: Array, enabled: Sequence[bool]) -> tuple[Array, Array]:
    """Return the pair of rank r * n of a MergedLinear, with B's blocks on their slices' rows."""
    count = sum(map(bool, enabled))
    if not count or len(B) % count:
        raise ConfigError(
            f"enable_lora of {path}: expected flags for slices that {len(B)} rows of lora_B belong to, got "
            f"{tuple(enabled)}; give those that the layer was made with"
        )
    width = len(B) // count
    try:
        slices = fused_adapters(A, B, 1.0, [width] * len(enabled), enabled)
    except ShapeError as error:
        raise ShapeError(f"{path}: {error}") from None
    r = B.shape[1]
    spread = np.zeros((width * len(enabled), r * count), B.dtype)
    for number, own in enumerate(slices):
        assert own.rows is not None, path
        spread[own.rows, number * r : (number + 1) * r] = own.B
    return A, spread


def _convolution(path: str, A: Array, B: Array, r: int) -> tuple[Array, Array]:
    """Return the pair of rank r * k * k of a Conv2d of one group.

    Row ``o * k + s`` of B @ A is the s-th k-th of output o's weights, one row after the other. So B's k rows
    of an output lie side by side, and each meets a copy of A in its own k-th of the columns.
    """
    k, rest = divmod(len(A), r)
    if rest or not k or A.shape[1] % k or len(B) % k or B.shape[1] != len(A):
        raise ShapeError(
            f"{path}: expected lora_A ({r} * k, in * k) and lora_B (out * k, {r} * k) of a convolution with "
            f"a k x k kernel and one group, got {A.shape} and {B.shape}; correct r, or train without it"
        )
    inputs, outputs = A.shape[1] // k, len(B) // k
    spread = np.zeros((k, len(A), k, A.shape[1]), A.dtype)
    spread[np.arange(k), :, np.arange(k), :] = A
    return spread.reshape(k * len(A), inputs, k, k), B.reshape(outputs, k * len(A), 1, 1)


def _bias_name(name: str, convolutions: Sequence[str]) -> str:
    path = name.removesuffix(".conv.bias")
    return f"{path}.bias" if path != name and matches(path, convolutions) else name


def _bias(tensors: Mapping[str, Array], made: Mapping[str, object]) -> str:
    if not tensors:
        return "none"
    return "lora_only" if all(name.removesuffix(".bias") in made for name in tensors) else "all"


def _alpha(r: int, lora_alpha: float, width: int) -> float:
    """Return the alpha that gives rank ``r * width`` the scaling of rank r, or the one that comes closest."""
    alpha = lora_alpha * width
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return min(near, key=lambda candidate: abs(candidate / (r * width) - lora_alpha / r))


def _exactly(path: str) -> str:
    """Return an expression for this path and no other that ends like it."""
    return f"^{re.escape(path)}"
