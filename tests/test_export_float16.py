"""Exports in float16: what does not fit is refused and named, what becomes zero is counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from export_fixtures import make_adapter, make_model
from refusal import refused
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from loracle.cli.app import app
from loracle.export import export, verify
from loracle.export.underflow import CountedWeights, Underflow
from loracle.files import Checkpoint, MergedWeights, read_adapter
from loracle.reference import NonFiniteError

NAME = "model.layers.1.mlp.up_proj.weight"
ADAPTED = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base and adapter."""
    root = tmp_path_factory.mktemp("float16")
    make_model(root / "base")
    make_adapter(root / "adapter", root / "base")
    return root


def changed(made: Path, folder: Path, entries: dict[str, dict[tuple[int, ...], float]]) -> Path:
    """A copy of the base in `folder`, with other values for some entries."""
    shutil.copytree(made / "base", folder)
    tensors = load_file(folder / "model.safetensors")
    for name, values in entries.items():
        for index, value in values.items():
            tensors[name][index] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_weight_beyond_float16_is_named_with_its_value_and_nothing_is_written(
    made: Path, tmp_path: Path
) -> None:
    base = changed(made, tmp_path / "base", {NAME: {(7, 3): -70000.0}})
    for quantization in (None, "int8"):
        refused(
            lambda quantization=quantization: export(
                base, tmp_path / "onnx", made / "adapter", dtype="fp16", quantization=quantization
            ),
            NonFiniteError,
            f"{NAME}: -70000.0 at (7, 3) overflows float16; choose a wider dtype",
        )
        assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert export(base, tmp_path / "onnx", made / "adapter").underflow == Underflow()


def test_a_merge_beyond_float16_is_named_and_nothing_is_written(made: Path, tmp_path: Path) -> None:
    base = changed(made, tmp_path / "base", {ADAPTED: {(7, 3): 70000.0}})
    refused(
        lambda: export(base, tmp_path / "onnx", made / "adapter", dtype="fp16"),
        NonFiniteError,
        f"{ADAPTED}: expected merged numbers of magnitude 65504 at most (float16), got an overflow at "
        "[7, 3]; merge to a wider dtype",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_becomes_zero_is_counted_with_its_tensors(made: Path, tmp_path: Path) -> None:
    """2^-25 is a tie and goes to zero; 2^-24 and 2^-15 are subnormal; 2^-14 is not, and a zero was one."""
    tiny = {(0, 0): 2.0**-25, (0, 1): -(2.0**-26), (5, 2): 2.0**-24, (5, 3): 2.0**-15, (6, 0): 2.0**-14}
    base = changed(
        made,
        tmp_path / "base",
        {NAME: {**tiny, (9, 9): 0.0, (9, 8): -0.0}, "model.norm.weight": {(3,): 1e-30}},
    )
    before = export(made / "base", tmp_path / "before", made / "adapter", dtype="fp16").underflow
    after = export(base, tmp_path / "after", made / "adapter", dtype="fp16").underflow
    assert (before.zeros, before.zeroed_tensors) == (0, 0)
    assert (after.zeros, after.zeroed_tensors) == (3, 2)
    assert after.subnormals == before.subnormals + 2
    assert export(base, tmp_path / "wide", made / "adapter").underflow == Underflow()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_counts_are_those_of_a_second_look_at_the_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    """Merged or not, from any dtype: against the float64 values of the tensors before and after."""
    base = make_model(tmp_path / "base", dtype=dtype)
    tensors = load_file(base / "model.safetensors")
    for number, tensor in enumerate(tensors.values()):
        scale = torch.logspace(-9, 0, tensor.numel()).roll(number).reshape(tensor.shape)
        tensor.copy_((tensor.double().sign() * scale).to(dtype))
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(tmp_path / "adapter", base)
    with Checkpoint(base) as checkpoint:
        weights = MergedWeights(checkpoint, read_adapter(adapter))
        source = CountedWeights(weights)
        zeros, zeroed, subnormals = 0, 0, 0
        for name in weights.names:
            got = source.tensor(name, np.float16).astype(np.float64)
            np.testing.assert_array_equal(got, weights.tensor(name, np.float16).astype(np.float64))
            if dtype != torch.float16 or name in weights.merged_names:
                start = checkpoint.tensor(name).astype(np.float64)
                lost = int(((got == 0) & (start != 0)).sum())
                zeros, zeroed = zeros + lost, zeroed + (lost > 0)
                subnormals += int(((got != 0) & (abs(got) < 2.0**-14)).sum())
        assert source.underflow() == Underflow(zeros, zeroed, subnormals)
        assert (zeros > 0) == (dtype != torch.float16)
        assert subnormals > 0


def test_the_command_says_what_became_zero_and_how_to_keep_it(made: Path, tmp_path: Path) -> None:
    base = changed(made, tmp_path / "base", {NAME: {(0, 0): 1e-9, (0, 1): 1e-9}})
    arguments = ["export", "--model", str(base), "--dtype", "fp16"]
    said = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "onnx")])
    assert said.exit_code == 0
    assert "2 entries of 1 weights became 0 in fp16; --dtype fp32 keeps them\n" in said.stdout
    told = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "json"), "--json"])
    assert json.loads(told.stdout)["underflow"]["zeros"] == 2
    plain = CliRunner().invoke(
        app, ["export", "--model", str(made / "base"), "--dtype", "fp16", "--out", str(tmp_path / "plain")]
    )
    assert "became 0" not in plain.stdout


def test_activations_that_overflow_fail_a_check(made: Path, tmp_path: Path) -> None:
    """Weights that fit, products that do not: a verdict, not a crash, and JSON that any parser reads."""
    entries = {(row, column): 6e4 for row in range(48) for column in range(80)}
    base = changed(made, tmp_path / "base", {"model.layers.1.mlp.down_proj.weight": entries})
    export(base, tmp_path / "onnx", made / "adapter", dtype="fp16")
    report = verify(tmp_path / "onnx", base, made / "adapter", new_tokens=2)
    assert [check.passed for check in report.checks][:3] == [True, True, False]
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["logits"]["largest_error"] is None
