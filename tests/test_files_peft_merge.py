"""PEFT's own merge of every kind of adapter, on small integers: the same bits as ours."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_files_peft_kinds import CASES, EXPERTS, Case, Layers

from loracle.files import Checkpoint, MergedWeights, name_parameters, read_adapter
from loracle.files.safetensors_writer import write_safetensors

ORDERS = {
    "experts": {EXPERTS: ("gate_up_proj", "down_proj")},
    "three parameters": {"experts": ("up", "gate", "down")},
}
# DoRA divides by a norm, and a norm of integers is none.
INEXACT = {"DoRA", "embedding, DoRA", "convolutions, DoRA"}
# PEFT merges twice into tied embeddings, and into out_proj of a MultiheadAttention.
TWICE = {name for name in CASES if name.startswith("tied")} | {"MultiheadAttention"}


def _integers(case: Case, folder: Path) -> Any:
    """Save the model to ``folder`` and return it with an adapter, all small integers; every scaling is 2."""
    import peft

    generator = torch.Generator().manual_seed(0)

    def fill(parameters: Any, least: int, most: int) -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(torch.randint(least, most, parameter.shape, generator=generator))

    model = case.model()
    fill(model.parameters(), -50, 50)
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    folder.mkdir()
    state = {
        name: tensor.detach().numpy().copy()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    write_safetensors(folder / "model.safetensors", state, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    options = {**case.options, "lora_alpha": 2 * case.options["r"]}
    patterns = {"rank_pattern": {}, "alpha_pattern": {}}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**{**options, **patterns})).eval()
    fill((parameter for parameter in tuned.parameters() if parameter.requires_grad), -3, 4)
    return tuned


@pytest.mark.parametrize("name", [name for name in CASES if name not in INEXACT | TWICE])
def test_ours_is_peft_s_merge(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = _integers(CASES[name], tmp_path / "base")
        tuned.save_pretrained(str(tmp_path / "adapter"))
        merged = {
            key: tensor.detach().numpy() for key, tensor in tuned.merge_and_unload().state_dict().items()
        }
    adapter = read_adapter(tmp_path / "adapter")
    if name in ORDERS:
        adapter = name_parameters(adapter, ORDERS[name])
    with Checkpoint(tmp_path / "base") as checkpoint:
        ours = MergedWeights(checkpoint, adapter)
        changed = set()
        for key in ours.names:
            tensor = ours.tensor(key)
            assert tensor.dtype == merged[key].dtype
            np.testing.assert_array_equal(tensor, merged[key], err_msg=key)
            if not np.array_equal(tensor, checkpoint.tensor(key)):
                changed.add(key)
        assert changed == set(ours.merged_names)


def test_both_projections_of_a_multihead_attention_get_their_update_once(tmp_path: Path) -> None:
    case = Case(Layers, {"r": 4, "target_modules": ["attention"]})
    tuned = _integers(case, tmp_path / "base")
    tuned.save_pretrained(str(tmp_path / "adapter"))
    attention = tuned.base_model.model.attention
    updates = {
        "attention.in_proj_weight": attention.get_delta_weight("default"),
        "attention.out_proj.weight": attention.base_layer.out_proj.get_delta_weight("default"),
    }
    with Checkpoint(tmp_path / "base") as checkpoint:
        ours = MergedWeights(checkpoint, read_adapter(tmp_path / "adapter"))
        assert set(ours.merged_names) == set(updates)
        for name, delta in updates.items():
            expected = checkpoint.tensor(name) + delta.detach().numpy()
            np.testing.assert_array_equal(ours.tensor(name), expected, err_msg=name)
