"""The commands as a user meets them: what they print and how they exit; nothing is left half written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from export_fixtures import make_adapter, make_model
from typer.testing import CliRunner

from loracle.cli.app import app
from loracle.cli.guard import one_line_errors
from loracle.reference import ConfigError
from loracle.torch_impl import FinetuneOptions

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    make_model(root / "base")
    make_adapter(root / "adapter", root / "base")
    rows = [{"prompt": f"say {i}", "completion": f"{i}{i}"} for i in range(8)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def call(*arguments: object) -> tuple[int, str, str]:
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_chain_from_base_to_answer(made: Path, tmp_path: Path) -> None:
    adapter, merged, exported = tmp_path / "adapter", tmp_path / "merged", tmp_path / "onnx"
    before = {path.name: path.read_bytes() for path in (made / "base").iterdir()}
    code, out, _ = call(
        *("finetune", "--model", made / "base", "--data", made / "data.jsonl", "--out", adapter),
        *("--max-steps", 2, "--batch-size", 2, "--rank", 3, "--no-bf16", "--json"),
    )
    assert code == 0
    assert json.loads(out)["steps"] == 2
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in adapter.iterdir()}
    code, out, _ = call("merge", "--model", made / "base", "--adapter", adapter, "--out", merged)
    assert code == 0
    assert "4 of" in out
    code, out, _ = call("export", "--model", made / "base", "--adapter", adapter, "--out", exported, "--json")
    assert code == 0
    assert len(json.loads(out)["merged_names"]) == 4
    for candidate in (exported, merged):
        code, out, _ = call("verify", candidate, "--model", made / "base", "--adapter", adapter, "--json")
        assert code == 0, out
        assert json.loads(out)["passed"] is True
    code, out, _ = call("run", exported, "--prompt", "hello", "--max-new-tokens", 3, "--json")
    assert code == 0
    assert 1 <= len(json.loads(out)["answers"][0]["tokens"]) <= 3
    assert {path.name: path.read_bytes() for path in (made / "base").iterdir()} == before


@pytest.mark.parametrize(("one", "other"), [("fsdp", "torch_compile"), ("torch_compile", "fsdp")])
def test_finetune_hands_every_option_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: str, other: str
) -> None:
    """Each option under its own name, with a value that is not its default; two exclude each other."""
    import loracle.torch_impl

    given = {
        "task": "causal-lm",
        **{"rank": 3, "alpha": 5.0, "dropout": 0.25, "epochs": 2.0, "max_steps": 7, "lr": 0.5},
        **{"loraplus_ratio": 4.0, "loraplus_lr_embedding": 0.125, "weight_decay": 0.1, "adam_beta1": 0.8},
        **{"adam_beta2": 0.9, "adam_epsilon": 0.01, "max_grad_norm": 2.0, "schedule": "constant"},
        **{"warmup": 0.5, "batch_size": 3, "gradient_accumulation": 2, "gradient_checkpointing": True},
        **{"chunked_loss": True, "packing": True, "mask_probability": 0.5, "max_length": 99, "seed": 6},
        **{"bf16": True, one: True, "eval_data": tmp_path / "e", "eval_steps": 4},
        **{"early_stopping_patience": 5, "save_steps": 8, "resume": True, "tensorboard": tmp_path / "t"},
    }
    named = {"model": str(made / "base"), "data": made / "data.jsonl", "out": tmp_path / "o"}
    seen: list[FinetuneOptions] = []

    def finetune(options: FinetuneOptions, progress: object) -> None:
        seen.append(options)
        raise ConfigError("seen")

    monkeypatch.setattr(loracle.torch_impl, "finetune", finetune, raising=False)
    arguments: list[object] = ["--targets", "k_proj"]
    for name, value in {**named, **given}.items():
        arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    assert call("finetune", *arguments)[0] == 2
    assert seen == [FinetuneOptions(**named, **given, targets=("k_proj",))]
    default = FinetuneOptions(**named)
    unchanged = {name for name in vars(default) if vars(default)[name] == vars(seen[0])[name]}
    assert unchanged == {*named, "task", other}


def test_finetune_tells_of_held_out_data(made: Path, tmp_path: Path) -> None:
    common = ("finetune", "--model", made / "base", "--data", made / "data.jsonl", "--max-steps", 2)
    held_out = ("--eval-data", made / "data.jsonl", "--eval-steps", 1, "--no-bf16")
    code, out, _ = call(*common, *held_out, "--out", tmp_path / "one")
    assert code == 0
    assert re.search(r"held out: loss \d\.\d+ to \d\.\d+ at step 2, perplexity \d+\.\d+", out)
    code, out, _ = call(*common, *held_out, "--out", tmp_path / "two", "--json")
    assert code == 0
    result = json.loads(out)
    assert [one["step"] for one in result["evaluations"]] == [0, 1, 2]
    assert (result["task"], result["best_step"], result["world_size"]) == ("causal-lm", 2, 1)


def test_a_failed_check_is_exit_code_1_and_names_the_tensor(made: Path, tmp_path: Path) -> None:
    assert call("export", "--model", made / "base", "--out", tmp_path / "onnx")[0] == 0
    code, out, _ = call("verify", tmp_path / "onnx", "--model", made / "base", "--adapter", made / "adapter")
    assert code == 1
    assert "FAIL initializers are the correctly rounded merge: model.layers.0.self_attn.q_proj.weight" in out


BAD: dict[str, tuple[Callable[[Path, Path], list[object]], str]] = {
    "missing model": (lambda r, t: ["export", "--model", t / "none", "--out", t / "o"], "none"),
    "empty model": (lambda r, t: ["export", "--model", t / "empty", "--out", t / "o"], "is empty"),
    "missing adapter": (
        lambda r, t: ["merge", "--model", r / "base", "--adapter", t / "none", "--out", t / "o"],
        "none",
    ),
    "adapter of another model": (
        lambda r, t: ["export", "--model", r / "base", "--adapter", t / "foreign", "--out", t / "o"],
        "self_attn.q_proj",
    ),
    "unknown adapter key": (
        lambda r, t: ["export", "--model", r / "base", "--adapter", t / "unknown", "--out", t / "o"],
        "use_telepathy",
    ),
    "adapter key that changes the mathematics": (
        lambda r, t: ["merge", "--model", r / "base", "--adapter", t / "dora", "--out", t / "o"],
        "use_dora",
    ),
    "no target matched": (
        lambda r, t: [
            *("finetune", "--model", r / "base", "--data", r / "data.jsonl"),
            *("--targets", "qproj", "--out", t / "o"),
        ],
        "q_proj",
    ),
    "malformed data": (
        lambda r, t: ["finetune", "--model", r / "base", "--data", t / "bad.jsonl", "--out", t / "o"],
        "line 2",
    ),
    "missing data": (
        lambda r, t: ["finetune", "--model", r / "base", "--data", t / "no.jsonl", "--out", t / "o"],
        "no.jsonl",
    ),
    "existing out": (
        lambda r, t: ["export", "--model", r / "base", "--out", t / "full"],
        "not empty",
    ),
    "existing out of finetune": (
        lambda r, t: ["finetune", "--model", r / "base", "--data", r / "data.jsonl", "--out", t / "full"],
        "not empty",
    ),
    "schedule": (
        lambda r, t: [
            *("finetune", "--model", r / "base", "--data", r / "data.jsonl"),
            *("--schedule", "sawtooth", "--out", t / "o"),
        ],
        "linear, cosine, constant",
    ),
    "task": (
        lambda r, t: [
            *("finetune", "--model", r / "base", "--data", r / "data.jsonl"),
            *("--task", "chess", "--out", t / "o"),
        ],
        "masked-lm",
    ),
    "patience without held-out data": (
        lambda r, t: [
            *("finetune", "--model", r / "base", "--data", r / "data.jsonl"),
            *("--early-stopping-patience", 2, "--out", t / "o"),
        ],
        "eval_data",
    ),
    "dtype": (
        lambda r, t: ["export", "--model", r / "base", "--dtype", "int3", "--out", t / "o"],
        "expected one of fp32, fp16",
    ),
    "nothing to run": (lambda r, t: ["run", t / "empty", "--prompt", "x"], "expected"),
    "nothing to verify": (lambda r, t: ["verify", t / "empty", "--model", r / "base"], "found neither"),
    "no tokens": (
        lambda r, t: ["run", t / "empty", "--prompt", "x", "--max-new-tokens", 0],
        "--max-new-tokens",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_one_line_and_exit_code_2(made: Path, tmp_path: Path, case: str) -> None:
    arguments, words = BAD[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    foreign = make_adapter(tmp_path / "foreign", made / "base")
    _edit_tensor_shapes(foreign)
    for name, change in (("unknown", {"use_telepathy": True}), ("dora", {"use_dora": True})):
        folder = make_adapter(tmp_path / name, made / "base")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    code, out, err = call(*arguments(made, tmp_path))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def _edit_tensor_shapes(adapter: Path) -> None:
    """Make it an adapter of a model whose hidden size is 40."""
    from safetensors.numpy import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in list(tensors):
        if "lora_A" in name:
            tensors[name] = tensors[name][:, :40].copy()
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "out/model.onnx_data"), 2, "No space left on device"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "pip install 'loracle[torch]'"),
        (ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir"), 2, "pip install 'loracle[onnx]'"),
    ],
)
def test_what_a_user_cannot_help_is_one_line_too(
    capsys: pytest.CaptureFixture[str], raised: BaseException, code: int, words: str
) -> None:
    import typer

    with pytest.raises(typer.Exit) as caught, one_line_errors(False):
        raise raised
    assert caught.value.exit_code == code
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1
    with pytest.raises(type(raised)), one_line_errors(True):
        raise raised


_WITHOUT_TORCH = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "accelerate", "peft"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from loracle.cli import main
main()
"""


def _without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_run_merge_and_a_second_export_need_no_torch(made: Path, tmp_path: Path) -> None:
    base, adapter = made / "base", made / "adapter"
    assert call("export", "--model", base, "--out", tmp_path / "first")[0] == 0
    done = _without_torch("export", "--model", base, "--adapter", adapter, "--out", tmp_path / "onnx")
    assert done.returncode == 0, done.stderr
    done = _without_torch("merge", "--model", base, "--adapter", adapter, "--out", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    done = _without_torch("run", tmp_path / "onnx", "--prompt", "hello", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    done = _without_torch("verify", tmp_path / "onnx", "--model", base, "--adapter", adapter)
    assert done.returncode == 2
    assert "pip install 'loracle[torch]'" in done.stderr


def test_version_and_help() -> None:
    code, out, _ = call("--version")
    assert code == 0
    assert out.startswith("loracle ")
    code, out, _ = call("--help")
    assert code == 0
    assert all(command in out for command in ("finetune", "merge", "export", "verify", "run"))
