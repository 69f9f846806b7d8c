"""The measurements for a GPU: on the CPU, small, they run whole, and judge what they measure."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("loralib")

from benchmarks import gpu, gpu_ceilings, gpu_decode, gpu_merge, gpu_train_step
from benchmarks.gpu_ceilings import Ceilings, measure_ceilings, seconds_of
from benchmarks.gpu_machine import describe_device, require_cuda
from benchmarks.gpu_train_step_report import checks
from benchmarks.train_step_subjects import (
    CONTROL,
    FLOOR,
    OURS,
    OURS_COMPILED,
    OURS_GRAPHS,
    PEFT,
    PEFT_COMPILED,
    SIZES,
    Workload,
    base_model,
    shape_of,
)

CPU = ["--quick", "--device", "cpu"]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_merge_is_correct_and_a_peers_wrong_entries_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_merge.main([*CPU, "--out", str(tmp_path / "merge.json")])
    found = read(tmp_path / "merge.json")
    rows = {row["way"]: row for row in found["rows"]}
    assert rows[gpu_merge.OURS]["wrongly_rounded"] == 0
    # In float32 and then rounded: wrong where two roundings differ, which is seldom.
    peer = rows[gpu_merge.PEFT]
    assert peer["wrong_share"] == peer["wrongly_rounded"] / found["entries"] < 0.01
    assert found["weights"] == 7
    assert found["entries"] == 2 * 64 * 64 + 2 * 32 * 64 + 3 * 176 * 64
    assert found["moved_bytes"] == 4 * found["entries"]
    assert len(rows[gpu_merge.OURS]["all_seconds"]) == 5
    assert "wrongly rounded" in capsys.readouterr().out


def test_a_wrong_merge_ends_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_merge.merge_all

    def wrong(found: Any) -> Any:
        merged = right(found)
        merged[3].view(torch.int16)[0, 0] += 1
        return merged

    monkeypatch.setattr(gpu_merge, "merge_all", wrong)
    with pytest.raises(SystemExit, match="got 1 that are not"):
        gpu_merge.main([*CPU, "--out", str(tmp_path / "merge.json")])
    assert read(tmp_path / "merge.json")["rows"][0]["wrongly_rounded"] == 1


def test_the_weights_are_those_of_the_model() -> None:
    for size in SIZES:
        model = shape_of(Workload("bfloat16", size=size))
        linear = [
            tuple(module.weight.shape)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        ]
        assert sorted(linear) == sorted(gpu_merge.shapes(SIZES[size]))


def test_the_sizes_are_those_of_the_models_that_they_are_named_after() -> None:
    counts = {
        name: sum(parameter.numel() for parameter in shape_of(Workload("bfloat16", size=name)).parameters())
        for name in SIZES
    }
    assert counts == {"135m": 134_515_008, "1.1b": 1_100_048_384, "7b": 6_738_415_616}


def test_a_training_step_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiling takes a minute; those ways are the ones below.
    ways = tuple(way for way in gpu_train_step.WAYS if way not in gpu_train_step.COMPILED)
    monkeypatch.setattr(gpu_train_step, "WAYS", ways)
    gpu_train_step.main([*CPU, "--targets", "q+v", "--out", str(tmp_path / "step.json")])
    found = read(tmp_path / "step.json")
    assert [row["way"] for row in found["rows"]] == [FLOOR, *ways]
    assert all(row["peak_bytes"] is None and row["seconds"] > 0 for row in found["rows"])
    (control,) = (row for row in found["rows"] if row["way"] == CONTROL)
    assert len(control["ratios"]) == 2
    assert control["interval"][0] <= control["ratio"] <= control["interval"][1]
    assert {row["way"] for row in found["parity"]} >= {OURS, PEFT}
    assert found["checks"] == []


def test_utilisation_is_of_four_operations_a_weight_and_token() -> None:
    work = Workload("bfloat16", attention="sdpa", layers=2, vocabulary=512, batch=2, length=16)
    row = gpu_train_step.row(
        work,
        gpu_train_step.Case("q+v", 16, 0.0),
        OURS,
        {"all_seconds": [3.0, 1.0, 2.0], "ratios": [1.5, 1.25, 1.0]},
        7,
        Ceilings(bytes_per_second=1e9, flops_per_second=1e12),
    )
    weights = 2 * (576 * 576 * 2 + 2 * 192 * 576 + 3 * 576 * 1536) + 512 * 576
    assert row["utilisation"] == pytest.approx(4 * weights * 32 / 2.0 / 1e12)
    assert row["seconds"] == 2.0
    assert row["ratio"] == 1.25
    assert row["bound_by"] == "memory"
    assert row["floor_seconds"] == pytest.approx(4 * weights / 1e9)


@pytest.mark.parametrize(
    ("name", "compiled_name"), [(PEFT, PEFT_COMPILED), (OURS, OURS_COMPILED), (OURS, OURS_GRAPHS)]
)
def test_a_compiled_way_has_the_names_of_the_others(name: str, compiled_name: str) -> None:
    work = Workload("bfloat16", attention="sdpa", layers=1, vocabulary=64, batch=1, length=4)
    case = gpu_train_step.Case("q+v", 2, 0.0)
    plain, compiled = (gpu_train_step.subject(own, base_model(work), case) for own in (name, compiled_name))
    assert plain.factors().keys() == compiled.factors().keys()
    counts = [
        sum(module._compiled_call_impl is not None for module in own.model.modules())
        for own in (plain, compiled)
    ]
    assert counts == [0, 1]


def test_what_is_aimed_at_is_checked_for_the_largest_model_alone() -> None:
    def row(size: str, targets: str, way: str, ratio: float) -> dict[str, Any]:
        return {"size": size, "length": 512, "targets": targets, "r": 16, "way": way, "ratio": ratio}

    rows = [
        row("7b", "all-linear", OURS, 1.11),
        row("7b", "all-linear", PEFT, 1.443),
        row("7b", "q+v", OURS, 1.5),
        row("7b", "q+v", PEFT, 1.5),
        row("1.1b", "all-linear", OURS, 1.5),
        row("1.1b", "all-linear", PEFT, 1.5),
    ]
    floor, peft = checks(rows)
    assert floor == {
        "length": 512, "check": "step, over the floor", "value": 1.11, "limit": 1.1, "holds": False
    }  # fmt: skip
    assert peft["value"] == pytest.approx(1.3)
    assert peft["holds"] == (1.443 / 1.11 >= 1.3)


@pytest.mark.slow
def test_decoding_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_decode.main([*CPU, "--out", str(tmp_path / "decode.json")])
    found = read(tmp_path / "decode.json")
    assert [(row["prompt"], row["way"]) for row in found["rows"]] == [
        (length, way)
        for length in (18, 256)
        for way in (gpu_decode.OURS, gpu_decode.GROWING, gpu_decode.STATIC)
    ]
    assert all(row["tokens_per_second"] > 0 for row in found["rows"])
    assert found["rows"][0]["over_ours"] is None
    assert found["rows"][1]["over_ours"] > 0
    assert found["agreeing_tokens"]["18"][gpu_decode.OURS] == 8
    (nodes,) = found["nodes"].values()
    # Of each of the two layers its attention; the step's alone, not the prompt's.
    assert nodes["GroupQueryAttention"] == 2
    assert f"all {sum(nodes.values())} nodes of a step on CPUExecutionProvider" in capsys.readouterr().out


def test_ceilings_and_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    # A copy reads and writes: two bytes for each; a product has two operations for each of rows^3.
    monkeypatch.setattr(gpu_ceilings, "median_seconds", lambda run, device: run() is not None and 0.5)
    found = measure_ceilings("cpu", copied_bytes=1000, rows=8)
    assert found == Ceilings(4000.0, 2048.0)
    assert found.seconds(4096, 2000) == 2.0
    assert found.bound(4096, 2000) == "arithmetic"
    assert found.seconds(1024, 4000) == 1.0
    assert found.bound(1024, 4000) == "memory"
    called: list[int] = []
    assert seconds_of(lambda: called.append(1), "cpu") >= 0
    assert called == [1]


def test_the_device_is_named() -> None:
    found = describe_device("cpu")
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "device" not in found
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="expected a CUDA device, found none"):
            require_cuda("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was run"))
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "expected a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_part_is_run_and_a_failure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[list[str]] = []

    def run(command: list[str], check: bool) -> Any:
        called.append(command[2:])
        return subprocess.CompletedProcess(command, 3 if "benchmarks.gpu_merge" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert [command[0] for command in called] == [
        "pytest",
        "benchmarks.gpu_merge",
        "benchmarks.gpu_train_step",
        "benchmarks.gpu_decode",
        "benchmarks.gpu_table1",
        "benchmarks.evidence_bench",
    ]
    assert called[1][1:] == ["--quick", "--device", "cpu", "--out", str(tmp_path / "gpu-merge.json")]
    assert "failed: merge\n" in capsys.readouterr().err
    called.clear()
    assert gpu.main(["--quick", "--device", "cpu", "--only", "tests", "--out", str(tmp_path)]) == 0
    assert [command[0] for command in called] == ["pytest"]
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
