"""What the writers are given: models, adapters, deployments with tasks, lines to learn from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from deployments import add, make_models, record
from export_fixtures import make_adapter
from safetensors.torch import load_file, save_file
from torch_fixtures import upper_pairs, write_lines, write_model
from transformers import AutoModelForCausalLM

from loracle.export import export

from .readers import SUFFIXES

_SHARD = "model.safetensors"


_made: list[Path] = []


def inputs_of_session(factory: pytest.TempPathFactory) -> Path:
    """The folder with all of it, made once; for reading alone."""
    if not _made:
        _made.append(make_inputs(factory.mktemp("inputs")))
    return _made[0]


def make_inputs(folder: Path) -> Path:
    """Make all of it in an empty folder."""
    make_models(folder)
    make_adapter(folder / "wide", folder / "base", ("q_proj", "o_proj"), seed=3)
    for form in SUFFIXES:
        add(folder, folder / f"{form}, one", "french", form, "attention")
        record(folder / f"{form}, one", "french")
        shutil.copytree(folder / f"{form}, one", folder / form)
        add(folder, folder / form, "german", form, "mlp")
        record(folder / form, "german")
    shutil.copytree(folder / "base", folder / "sharded", ignore=shutil.ignore_patterns(_SHARD))
    AutoModelForCausalLM.from_pretrained(folder / "base").save_pretrained(
        folder / "sharded", max_shard_size="60KB"
    )
    shutil.copytree(folder / "base", folder / "mixed")
    tensors = load_file(folder / "base" / _SHARD)
    # A base in this folder has a data file of its own: what the shard has in another dtype.
    mixed = {name: held.to(torch.bfloat16) if "norm" in name else held for name, held in tensors.items()}
    save_file(mixed, folder / "mixed" / _SHARD, {"format": "pt"})
    export(folder / "base", folder / "baked", folder / "attention")  # which leaves the graph in the cache
    write_model(folder / "llama")
    write_lines(folder / "pairs.jsonl", upper_pairs(8))
    return folder
