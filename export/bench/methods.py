"""The ways of adapting a model that are compared, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping

FULL = "full"
CONTROL = "control"
MERGED = "lora-merged"
UNMERGED = "lora-unmerged"
INPUTS = "lora-inputs"
ADAPTER_H = "adapter-h"
ADAPTER_L = "adapter-l"
PREFIX = "prefix"
PROMPT = "prompt"

METHODS = (MERGED, UNMERGED, INPUTS, ADAPTER_H, ADAPTER_L, PREFIX, PROMPT)
"""What a user may ask for, each compared with `FULL`; `CONTROL` always is."""

LABELS: Mapping[str, str] = {
    FULL: "full fine-tune",
    CONTROL: "A/A control",
    MERGED: "LoRA, merged",
    UNMERGED: "LoRA, unmerged",
    INPUTS: "LoRA, unmerged, as inputs",
    ADAPTER_H: "AdapterH",
    ADAPTER_L: "AdapterL",
    PREFIX: "prefix tuning",
    PROMPT: "prompt tuning",
}

ABOVE = (UNMERGED, INPUTS, ADAPTER_H, ADAPTER_L)
"""What the paper says costs time, in every setting."""
