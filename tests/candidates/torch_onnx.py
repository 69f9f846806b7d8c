"""Export a checkpoint's model, without a cache, with torch.onnx.export.

python torch_onnx.py CHECKPOINT MODEL.ONNX
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn


class Logits(nn.Module):
    """A transformers model as a function of the tokens and the mask."""

    def __init__(self, model: nn.Module, **options: bool) -> None:
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options).logits
        return logits


def main() -> None:
    checkpoint, out = map(Path, sys.argv[1:])
    config = json.loads((checkpoint / "config.json").read_text())
    (name,) = config["architectures"]
    model = getattr(transformers, name).from_pretrained(checkpoint).eval()
    options = {"use_cache": False} if name.endswith("ForCausalLM") or "LMHead" in name else {}
    ids = torch.randint(3, config["vocab_size"], (2, 5))
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    with torch.no_grad():
        torch.onnx.export(
            Logits(model, **options),
            (ids, torch.ones_like(ids)),
            out,
            dynamo=True,
            external_data=True,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes=({0: batch, 1: sequence}, {0: batch, 1: sequence}),
        )


if __name__ == "__main__":
    main()
