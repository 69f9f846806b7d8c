"""Merge an adapter with PEFT and save the checkpoint, as a user of PEFT would.

PYTHON -m benchmarks.peft_merge BASE ADAPTER OUT DTYPE
"""

from __future__ import annotations

import sys
from typing import Any


def merged_model(base: str, adapter: str, dtype: str) -> Any:
    """The transformers model in `dtype`, with the adapter merged by PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def main() -> None:
    from transformers import AutoTokenizer

    base, adapter, out, dtype = sys.argv[1:]
    merged_model(base, adapter, dtype).save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


if __name__ == "__main__":
    main()
