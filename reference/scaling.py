"""The factor between ``B @ A`` and the weight update."""

import math

from .errors import ConfigError


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """Return ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rank-stabilised LoRA.

    The quotient is a float64, rounded once (twice with the square root); everything downstream takes that
    number as exact.

    Args:
        r: rank of the adapter, at least 1.
        lora_alpha: finite; zero and negative values are legal (they switch the adapter off or turn it round).
        use_rslora: divide by the square root of the rank.

    Raises:
        ConfigError: ``r`` is not a positive integer, or ``lora_alpha`` is not finite.

    Source: LoRA, arXiv 2106.09685, section 4.1 (alpha / r); rsLoRA, arXiv 2312.03732 (alpha / sqrt(r)).
    """
    if isinstance(r, bool) or not hasattr(r, "__index__") or r < 1:
        raise ConfigError(f"r: expected an integer of at least 1, got {r!r}; set the adapter's rank")
    if not math.isfinite(lora_alpha):
        raise ConfigError(
            f"lora_alpha: expected a finite number, got {lora_alpha!r}; correct the adapter's config"
        )
    return float(lora_alpha) / (math.sqrt(r) if use_rslora else int(r))
