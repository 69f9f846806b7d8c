"""Which of transformers' two attentions a batch is computed with."""

from typing import Any

SHORT = 128
"""Tokens up to which plain products beat torch's fused attention in bfloat16 on the CPU (torch 2.13)."""


class AttentionChoice:
    """Switches a model between plain and fused attention by the length of each batch.

    The fused kernel's backward pass takes several times as long as plain products on short sequences of
    bfloat16 on the CPU: a fifth of a whole training step. Plain products keep the attention's weights,
    quadratic in the length, so long batches stay with the fused kernel. In float32, or on another device,
    nothing is switched.
    """

    def __init__(self, model: Any, *, bf16: bool) -> None:
        self._model = model
        fused = getattr(model.config, "_attn_implementation", None) == "sdpa"
        self._active = bf16 and fused and model.device.type == "cpu"

    def choose(self, length: int) -> None:
        """Prepare the model for a batch of ``length`` tokens."""
        self._switch("eager" if length <= SHORT else "sdpa")

    def fuse(self) -> None:
        """Prepare the model for batches that are not learned from: no backward pass, so the fused kernel."""
        self._switch("sdpa")

    def _switch(self, wanted: str) -> None:
        if self._active and self._model.config._attn_implementation != wanted:
            self._model.set_attn_implementation(wanted)
