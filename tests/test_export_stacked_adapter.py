"""The adapter of single experts as that of the stacked ones: the same updates, and nothing left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import transformers as hf
from architectures import CASES
from expert_fixtures import OWN_NAMES, adapter_apart
from files_fixtures import random_array
from refusal import refused

from loracle.export.verification.stacked_adapter import with_experts_stacked
from loracle.files import Adapter, LoraPair
from loracle.reference import TargetError, expert_factors_from_peft

EXPERTS, HIDDEN, INNER = 4, 48, {"mixtral": 80, "qwen3_moe": 40}


def model(kind: str) -> Any:
    return hf.AutoModelForCausalLM.from_config(CASES[kind].config())


def update(pair: LoraPair) -> np.ndarray[Any, Any]:
    return np.asarray(pair.scaling * (pair.B.astype(np.float64) @ pair.A))


@pytest.mark.parametrize("kind", list(OWN_NAMES))
def test_each_expert_gets_its_update_whatever_its_rank_and_scaling(kind: str) -> None:
    """One expert has another rank and another scaling than the others, and one has none."""
    module, (gate, up, down) = OWN_NAMES[kind]
    apart = adapter_apart(kind, 1, EXPERTS, HIDDEN, INNER[kind])
    own = f"model.layers.0.{module}.experts"
    config = replace(
        apart.config, rank_pattern={f"experts.1.{up}": 5}, alpha_pattern={f"experts.2.{down}": 7}
    )
    pairs = {path: replace(pair, scaling=config.scaling_of(path)) for path, pair in apart.pairs.items()}
    wide = random_array((5, HIDDEN), 1), random_array((INNER[kind], 5), 2)
    pairs[f"{own}.1.{up}"] = LoraPair(*wide, config.scaling_of(f"{own}.1.{up}"))
    del pairs[f"{own}.3.{gate}"]
    stacked = with_experts_stacked(Adapter(config, pairs), model(kind))
    path = "model.layers.0.mlp.experts"
    assert set(stacked.pairs) == {
        f"{path}.gate_up_proj",
        f"{path}.down_proj",
        "model.layers.0.mlp.gate.weight",
    }
    for name, parts in (("gate_up_proj", (gate, up)), ("down_proj", (down,))):
        pair = stacked.pairs[f"{path}.{name}"]
        A, B = expert_factors_from_peft(pair.A, pair.B, EXPERTS)
        got = np.split(pair.scaling * (B @ A), len(parts), axis=1)
        for e in range(EXPERTS):
            for part, rows in zip(parts, got, strict=True):
                one = pairs.get(f"{own}.{e}.{part}")
                wanted = np.zeros(rows[e].shape) if one is None else update(one)
                np.testing.assert_allclose(rows[e], wanted, rtol=0, atol=np.finfo(np.float64).eps * 64)


def test_an_adapter_without_experts_of_its_own_stays_what_it_is() -> None:
    apart = adapter_apart("mixtral", 1, EXPERTS, HIDDEN, INNER["mixtral"])
    router = {path: pair for path, pair in apart.pairs.items() if path.endswith("gate")}
    adapter = replace(apart, pairs=router)
    assert with_experts_stacked(adapter, model("mixtral")) is adapter


def test_what_stacked_experts_cannot_have_is_refused_by_name() -> None:
    apart = adapter_apart("qwen3_moe", 1, EXPERTS, HIDDEN, INNER["qwen3_moe"])
    pairs = {path: replace(pair, magnitude=np.ones(len(pair.B))) for path, pair in apart.pairs.items()}
    dora = Adapter(replace(apart.config, use_dora=True), pairs)
    path = next(iter(pairs))
    refused(
        lambda: with_experts_stacked(dora, model("qwen3_moe")),
        TargetError,
        f"{path}: expected lora_A and lora_B alone for an expert, got more; its model cannot be evaluated "
        "unmerged",
    )


def test_experts_of_a_layer_that_the_model_has_not_are_refused_by_name() -> None:
    apart = adapter_apart("qwen3_moe", 3, EXPERTS, HIDDEN, INNER["qwen3_moe"])
    refused(
        lambda: with_experts_stacked(apart, model("qwen3_moe")),
        TargetError,
        "model.layers.2.mlp.experts: expected in the model, found none; is this adapter for another model?",
    )
