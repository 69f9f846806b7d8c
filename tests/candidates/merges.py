"""Checkpoints that others merge. Each function: (base, adapter, folder to make) -> that folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import torch
import transformers
from peft import PeftModel

from loracle.files import read_adapter, write_merged_checkpoint

from .tensors import copy_tokenizer, read, write

Merge = Callable[[Path, Path, Path], Path]


def _loaded(base: Path, dtype: str = "auto") -> Any:
    (name,) = json.loads((base / "config.json").read_text())["architectures"]
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    return getattr(transformers, name).from_pretrained(base, dtype=kind)


def by_loracle(base: Path, adapter: Path, out: Path, *, dtype: str | None = None) -> Path:
    """`loracle merge`."""
    write_merged_checkpoint(base, adapter, out, dtype=dtype)
    return out


def by_peft(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    safe: bool = False,
    cycles: int = 0,
    dtype: str = "auto",
    shard: str = "5GB",
) -> Path:
    """`merge_and_unload`, after so many times of `merge_adapter` and `unmerge_adapter`; the base is loaded in
    `dtype`, and the merge saved in files of the size of `shard`."""
    model = PeftModel.from_pretrained(_loaded(base, dtype), adapter)
    for _ in range(cycles):
        model.merge_adapter(safe_merge=safe)
        model.unmerge_adapter()
    model.merge_and_unload(safe_merge=safe).save_pretrained(out, max_shard_size=shard)
    copy_tokenizer(out, base)
    return out


def by_loralib(base: Path, adapter: Path, out: Path, *, cycles: int = 0) -> Path:
    """loralib's layers in the places of the adapted ones, merged by `eval()`, after so many times of `eval()`
    and `train()`."""
    model = _loaded(base).train()
    for path, pair in read_adapter(adapter).pairs.items():
        old = model.get_submodule(path)
        rank = len(pair.A)
        layer = loralib.Linear(
            old.in_features,
            old.out_features,
            r=rank,
            lora_alpha=pair.scaling * rank,
            bias=old.bias is not None,
            dtype=old.weight.dtype,
        )
        layer.load_state_dict(old.state_dict(), strict=False)
        layer.lora_A.data.copy_(torch.from_numpy(pair.A))
        layer.lora_B.data.copy_(torch.from_numpy(pair.B))
        model.set_submodule(path, layer)
    for _ in range(cycles):
        model.eval()
        model.train()
    model.eval()
    merged = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    whole = _loaded(base)
    whole.load_state_dict(merged)
    whole.save_pretrained(out)
    copy_tokenizer(out, base)
    return out


def by_hand(base: Path, adapter: Path, out: Path) -> Path:
    """`W + scaling * (B @ A)` in the dtype of the base, as people write it."""
    tensors = read(base)
    for path, pair in read_adapter(adapter).pairs.items():
        W = tensors[f"{path}.weight"]
        A, B = (torch.from_numpy(factor).to(W.dtype) for factor in (pair.A, pair.B))
        tensors[f"{path}.weight"] = W + pair.scaling * (B @ A)
    return write(out, tensors, base)


def cast(base: Path, adapter: Path, out: Path, *, through: torch.dtype, to: torch.dtype) -> Path:
    """The right merge, with every tensor cast to one dtype and then to another."""
    by_loracle(base, adapter, out.with_name(f"{out.name} right"))
    tensors = read(out.with_name(f"{out.name} right"))
    return write(out, {name: value.to(through).to(to) for name, value in tensors.items()}, base)
