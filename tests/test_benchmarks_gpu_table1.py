"""Table 1 in torch: on the CPU, small, it runs whole; its adapters are the paper's."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("loralib")

from benchmarks import gpu_table1
from benchmarks.gpu_table1 import (
    NAMES,
    PEFT_UNMERGED,
    WAYS,
    Bottleneck,
    check_parity,
    lora_rank,
    model_of,
    way_of,
)
from loracle.export.bench.methods import ADAPTER_H, ADAPTER_L, CONTROL, FULL, MERGED, UNMERGED
from loracle.export.bench.sizes import adapter_h_parameters, adapter_l_parameters

TOKENS = torch.tensor([[5, 77, 30], [8, 1, 2]])
BUDGET = 3_000.0


@pytest.fixture(scope="module")
def base() -> Any:
    return model_of("cpu", quick=True)


def test_it_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_table1.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "table.json")])
    found = json.loads((tmp_path / "table.json").read_text())
    assert [(row["batch"], row["length"], row["way"]) for row in found["rows"]] == [
        (batch, length, way) for batch, length in ((1, 16), (2, 8)) for way in (FULL, *WAYS)
    ]
    assert all(row["seconds"] > 0 for row in found["rows"])
    assert [len(row["ratios"]) for row in found["rows"] if row["way"] != FULL] == [2] * 12
    assert "over full fine-tune" in capsys.readouterr().out


def test_the_papers_numbers_stand_beside_its_settings() -> None:
    row = {"ratio": 1.2, "interval": (1.1, 1.3, 0.95), "seconds": 0.02, "parameters": 11e6, "paper": 1.207}
    rows = [{**row, "batch": 1, "length": 128, "way": ADAPTER_L}]
    table = gpu_table1.table_of({"model": "m", "layers": 24, "dtype": "float16", "rows": rows})
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["1 x 128", NAMES[ADAPTER_L], "11.00M", "20.00", "1.200 [1.100, 1.300]", "1.207"]


@pytest.mark.parametrize("normed", [False, True])
def test_an_adapter_is_the_papers_formula(normed: bool) -> None:
    torch.manual_seed(0)
    own = Bottleneck(6, 4, normed=normed).double()
    for parameter in own.parameters():
        parameter.data.normal_()
    h = torch.randn(3, 6, dtype=torch.float64)
    value = {name: parameter.detach().numpy() for name, parameter in own.named_parameters()}
    x = h.numpy()
    if normed:
        centred = x - x.mean(1, keepdims=True)
        x = centred / np.sqrt(centred.var(1, keepdims=True) + 1e-5)
        x = x * value["norm.weight"] + value["norm.bias"]
    inner = x @ value["down.weight"].T + value["down.bias"]
    erf = np.vectorize(math.erf)
    inner = np.maximum(inner, 0) if normed else 0.5 * inner * (1 + erf(inner / np.sqrt(2)))
    expected = h.numpy() + inner @ value["up.weight"].T + value["up.bias"]
    np.testing.assert_allclose(own(h).detach().numpy(), expected, rtol=1e-12)


def test_ways_have_as_many_parameters_as_asked_for(base: Any) -> None:
    counts = {name: way_of(name, base, BUDGET, zero=False).parameters for name in (FULL, *WAYS)}
    # Ranks 5, 10 and 6 of two layers, 64 wide.
    assert counts[ADAPTER_H] == adapter_h_parameters(2, 64, 5)
    assert counts[ADAPTER_L] == adapter_l_parameters(2, 64, 10)
    assert lora_rank(base.config, BUDGET) == 6
    assert counts[UNMERGED] == counts[PEFT_UNMERGED] == 2 * 6 * (64 + 192)
    assert counts[FULL] is counts[CONTROL] is counts[MERGED] is None


def test_only_what_adapts_changes_the_logits(base: Any) -> None:
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    full = way_of(FULL, base, BUDGET, zero=False).forward(TOKENS)
    assert full.shape == (2, 3, base.config.vocab_size)
    for name in WAYS:
        own = way_of(name, base, BUDGET, zero=False).forward(TOKENS)
        assert torch.equal(own, full) == (name == CONTROL), name
    check_parity(base, BUDGET, TOKENS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_a_way_that_computes_something_else_is_not_measured(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = way_of

    def wrong(name: str, base: Any, budget: float, *, zero: bool) -> Any:
        return right(name, base, budget, zero=zero and name != ADAPTER_H)

    monkeypatch.setattr(gpu_table1, "way_of", wrong)
    with pytest.raises(SystemExit, match=r"^AdapterH: expected the model's logits with an update of zero"):
        check_parity(base, BUDGET, TOKENS)
