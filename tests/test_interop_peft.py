"""PEFT as an independent opinion: it loads what we train, and we export what it trains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from export_fixtures import make_model
from transformers import AutoModelForCausalLM

from loracle.export import export, verify
from loracle.export.verification.truth import Float64Model
from loracle.files import read_adapter
from loracle.torch_impl import FinetuneOptions, finetune

FLOAT32 = np.dtype(np.float32)
IDS = [5, 77, 30, 12, 90, 41, 3]


def peft_logits(base: Path, adapter: Path) -> np.ndarray:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].double().numpy()


def test_peft_gives_the_logits_of_an_adapter_that_we_trained(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    rows = [{"prompt": f"say {i}", "completion": f"{i}{i}"} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finetune(
        FinetuneOptions(
            model=str(base),
            data=tmp_path / "data.jsonl",
            out=tmp_path / "adapter",
            rank=3,
            targets="all-linear",
            max_steps=3,
            batch_size=2,
            lr=0.05,
            bf16=False,
            save_steps=0,
        )
    )
    adapter = read_adapter(tmp_path / "adapter")
    tuned = Float64Model(base, adapter).evaluate([IDS], FLOAT32)[0]
    plain = Float64Model(base, None).evaluate([IDS], FLOAT32)[0]
    assert len(adapter.pairs) == 14
    assert np.abs(peft_logits(base, tmp_path / "adapter") - tuned.logits).max() <= tuned.tolerance
    assert np.abs(plain.logits - tuned.logits).max() > 100 * tuned.tolerance


PEFT_CONFIGS = {
    "query and value": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "all linear, rsLoRA": peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", use_rslora=True),
    "patterns": peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*\.(q_proj|down_proj)",
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 5},
    ),
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_an_adapter_trained_with_peft_exports_and_verifies(tmp_path: Path, name: str) -> None:
    base = make_model(tmp_path / "base")
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), PEFT_CONFIGS[name])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = torch.randint(0, 256, (2, 9))
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    export(base, tmp_path / "onnx", tmp_path / "adapter")
    report = verify(tmp_path / "onnx", base, tmp_path / "adapter", new_tokens=4)
    assert report.passed, [check.failures for check in report.checks]
    truth = Float64Model(base, read_adapter(tmp_path / "adapter"))
    ours = truth.evaluate([IDS], FLOAT32)[0]
    assert np.abs(peft_logits(base, tmp_path / "adapter") - ours.logits).max() <= ours.tolerance
