"""The models that `benchmarks.export` exports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loracle.demo.smollm2 import model_folder

from .export_ways import BUILDER, CACHED, FIRST, OPTIMUM, TORCH
from .llama_model import LlamaShape, write_llama
from .peers import compatible

SMOL, MIDDLE, LARGE, TINY = "135m", "1.1b", "7b", "tiny"


@dataclass(frozen=True)
class Model:
    """A base model, and how it is exported.

    Attributes:
        shape: of random weights; None for SmolLM2-135M-Instruct as it is.
        stored: the dtype of the checkpoint.
        precision: "fp32" or "fp16", of the export.
        ways: those that run unless others are asked for.
        judged: whether logits are held against the model in float64; else against those of the first way.
    """

    name: str
    shape: LlamaShape | None
    stored: str
    precision: str
    ways: tuple[str, ...]
    judged: bool

    @property
    def described(self) -> str:
        """In words."""
        what = "SmolLM2-135M-Instruct" if self.shape is None else f"random weights of a {self.name} Llama"
        return f"{what}, {self.stored} to {self.precision}"

    def make(self, folder: Path) -> Path:
        """Write the base model into `folder`, as older packages can read it too."""
        if self.shape is None:
            return compatible(model_folder(), folder)
        return write_llama(folder, self.shape, self.stored)


_MOST = (CACHED, FIRST, BUILDER, TORCH)
MODELS = {
    model.name: model
    for model in (
        Model(SMOL, None, "float32", "fp32", (*_MOST, OPTIMUM), True),
        # Optimum's peak is more than five times the weights in float32.
        Model(MIDDLE, LlamaShape(2048, 22, 32, 4, 5632), "bfloat16", "fp32", _MOST, False),
        Model(
            LARGE,
            LlamaShape(4096, 32, 32, 32, 11008, max_position_embeddings=4096),
            "bfloat16",
            "fp16",
            (CACHED, FIRST),
            False,
        ),
        Model(TINY, LlamaShape(64, 2, 4, 2, 128, 512), "bfloat16", "fp32", (*_MOST, OPTIMUM), True),
    )
}
