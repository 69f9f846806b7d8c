"""The configuration under which an adapter that started as a part of W0 is an ordinary one."""

import re
from collections.abc import Mapping
from dataclasses import replace

from loracle.files import LoraConfig
from loracle.files.adapter_ranks import alpha_for
from loracle.reference import lora_scaling

from .update import TAKEN_FROM_W0


def plain_config(config: LoraConfig, scalings: Mapping[str, float]) -> LoraConfig:
    """Return the configuration of what `LoraUpdate.matrices` gives: twice the rank, the same scaling.

    Another start than PiSSA's or OLoRA's leaves the adapter what it is, and the configuration too.

    Args:
        config: of the adapter as it trains.
        scalings: of each layer, by path.

    alpha is doubled where the scaling is alpha / r, which keeps it exactly. alpha / sqrt(r) becomes
    alpha' / (2 r), with the alpha' for which that is the same float64, or its neighbour where none is.
    """
    if config.init_lora_weights not in TAKEN_FROM_W0:
        return config
    doubled = replace(
        config,
        r=2 * config.r,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        init_lora_weights=True,
        use_rslora=False,
    )
    if not config.use_rslora:
        return replace(
            doubled,
            lora_alpha=2 * config.lora_alpha,
            alpha_pattern={key: 2 * alpha for key, alpha in config.alpha_pattern.items()},
        )
    common = alpha_for(lora_scaling(config.r, config.lora_alpha, True), doubled.r)
    alphas = {path: alpha_for(scaling, doubled.rank_of(path)) for path, scaling in scalings.items()}
    own = {re.escape(path): alpha for path, alpha in alphas.items() if alpha != common}
    return replace(doubled, lora_alpha=common, alpha_pattern=own)
