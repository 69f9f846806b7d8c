"""The low-rank update of one adapter, and its gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import ConfigError, ShapeError
from .formats import Array


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update ``delta = scaling * B @ A`` of a frozen weight, with what one adapter needs beside it.

    Args:
        A: (r, in), the tensor ``lora_A``.
        B: (out, r), the tensor ``lora_B``.
        scaling: see `lora_scaling`; a float64, taken as exact.
        bias: (out,), the bias of ``lora_B`` (PEFT's ``lora_bias``); the layer adds ``scaling * bias``.
        dropout: of the layer input's shape, what to multiply the adapter's input by: 0 where dropped,
            1 / (1 - p) where kept. The base product always sees the input itself.
        rows: which rows of the weight, that is which outputs, the update is added to; all of them by
            default. A fused projection is a weight with an adapter for each slice of rows.

    Source: LoRA, arXiv 2106.09685, section 4.1; dropout as in the authors' loralib; ``bias`` as in PEFT.
    """

    A: Array
    B: Array
    scaling: float
    bias: Array | None = None
    dropout: Array | None = None
    rows: slice | None = None


@dataclass(frozen=True, eq=False)
class LowRankGradients:
    """Gradients of one adapter, of its tensors' shapes; ``dbias`` is None where ``lora_B`` has no bias."""

    dA: Array  # noqa: N815
    dB: Array  # noqa: N815
    dbias: Array | None


@dataclass(frozen=True, eq=False)
class LayerGradients:
    """Gradients of a layer: of its input, its bias, and of each adapter in turn. The weight is frozen."""

    dx: Array
    dbias: Array
    adapters: tuple[LowRankGradients, ...]


def fused_adapters(
    A: Array, B: Array, scaling: float, widths: Sequence[int], enabled: Sequence[bool]
) -> tuple[LowRank, ...]:
    """Return one `LowRank` for each enabled slice of a fused projection, from loralib's tensors.

    Args:
        A: (r * n, in) and
        B: (the enabled widths' sum, r), where n slices are enabled; slice after slice.
        scaling: of each of them.
        widths: how many outputs each slice has, in order: loralib's MergedLinear has equal ones, a fused
            query-key-value projection with grouped heads has not.
        enabled: whether the slice has an adapter.

    No slice enabled gives no adapter.

    Raises:
        ShapeError, ConfigError: what does not fit is named.

    Source: loralib 0.1.2, ``MergedLinear.merge_AB``.
    """
    try:
        slices = list(zip(widths, enabled, strict=True))
    except ValueError:
        raise ConfigError(
            f"enabled: expected a flag for each of the {len(widths)} slices, got {len(enabled)}; give all"
        ) from None
    count = sum(map(bool, enabled))
    outputs = sum(width for width, on in slices if on)
    if B.ndim != 2 or B.shape[0] != outputs:
        raise ShapeError(
            f"B: expected ({outputs}, r) for the enabled slices, got {B.shape}; is it transposed?"
        )
    r = B.shape[1]
    if A.ndim != 2 or A.shape[0] != r * count:
        raise ShapeError(
            f"A: expected ({r * count}, in) for {count} slices with r = {r}, got {A.shape}; check enabled"
        )
    adapters: list[LowRank] = []
    start = row = 0
    for width, on in slices:
        if on:
            own = slice(len(adapters) * r, (len(adapters) + 1) * r)
            adapters.append(LowRank(A[own], B[row : row + width], scaling, rows=slice(start, start + width)))
            row += width
        start += width
    return tuple(adapters)
