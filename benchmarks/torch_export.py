"""Merge with PEFT and export a decoder with its cache by `torch.onnx.export(dynamo=True)`.

    python -m benchmarks.torch_export BASE ADAPTER MODEL.ONNX DTYPE

Inputs and outputs have Optimum's names. All is done in one process, without a checkpoint in between.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .peft_merge import merged_model


class Decoder(nn.Module):
    """The model with the keys and values of its cache as plain tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        answer = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [tensor for layer in answer.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (answer.logits, *present)


def export_decoder(model: Any, out: Path) -> None:
    """Export a decoder of transformers, with its cache as plain tensors, to a new folder's file."""
    config = model.config
    names = [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
    # Sizes that are no other dimension's, so that none is taken for another.
    rows, new, old = 2, 3, 5
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (rows, getattr(config, "num_key_value_heads", config.num_attention_heads), old, width)
    batch, sequence, length, total = (
        torch.export.Dim(name) for name in ("batch", "sequence", "past", "total")
    )
    with torch.no_grad():
        torch.onnx.export(
            Decoder(model).eval(),
            (
                torch.zeros((rows, new), dtype=torch.int64),
                torch.ones((rows, old + new), dtype=torch.int64),
                torch.arange(old, old + new).repeat(rows, 1),
                [torch.zeros(shape, dtype=model.dtype) for _ in names],
            ),
            str(out),
            dynamo=True,
            external_data=True,
            input_names=[
                "input_ids",
                "attention_mask",
                "position_ids",
                *(f"past_key_values.{name}" for name in names),
            ],
            output_names=["logits", *(f"present.{name}" for name in names)],
            dynamic_shapes=(
                {0: batch, 1: sequence},
                {0: batch, 1: total},
                {0: batch, 1: sequence},
                [{0: batch, 2: length} for _ in names],
            ),
        )


def main() -> None:
    base, adapter, out, dtype = sys.argv[1:]
    Path(out).parent.mkdir(parents=True)
    export_decoder(merged_model(base, adapter, dtype).eval(), Path(out))


if __name__ == "__main__":
    main()
