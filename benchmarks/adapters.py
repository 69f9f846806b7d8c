"""Adapters to measure with: their values do not matter to speed, their shapes do."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loracle.files import Adapter, Checkpoint, LoraConfig, LoraPair, write_adapter

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_adapter(
    model: Path,
    out: Path,
    *,
    r: int = 8,
    alpha: int = 16,
    targets: tuple[str, ...] = ALL_LINEAR,
    seed: int = 0,
) -> Path:
    """A seeded PEFT adapter for `targets` of `model`, small enough that answers stay sensible."""
    rng = np.random.default_rng(seed)
    pairs = {}
    with Checkpoint(model) as checkpoint:
        for name in checkpoint.names:
            path = name.removesuffix(".weight")
            if path.rpartition(".")[2] in targets:
                rows, columns = checkpoint.shape(name)
                pairs[path] = LoraPair(
                    (rng.standard_normal((r, columns)) / columns**0.5).astype(np.float32),
                    (rng.standard_normal((rows, r)) * 0.01).astype(np.float32),
                    alpha / r,
                )
    out.mkdir(parents=True, exist_ok=True)
    write_adapter(out, Adapter(LoraConfig(r=r, lora_alpha=alpha, target_modules=targets), pairs))
    return out
