"""Whole runs on a tiny model: what is learned and written, that it repeats and resumes, and what stops it."""

import csv
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from task_fixtures import tiny_bert, write_words_model
from torch_fixtures import byte_tokenizer, tiny_llama, upper_pairs, write_lines, write_model
from transformers import AutoModelForCausalLM

from loracle.files import read_adapter
from loracle.reference import (
    ConfigError,
    DataError,
    FileError,
    NonFiniteError,
    TargetError,
    gamma,
    unit_roundoff,
)
from loracle.torch_impl import FinetuneOptions, FinetuneResult, finetune, load_adapter, lora_layers
from loracle.torch_impl.attention import AttentionChoice
from loracle.torch_impl.data import read_examples
from loracle.torch_impl.encoding import encode_all
from loracle.torch_impl.sampling import LengthGroupedSampler

FILES = ["adapter_config.json", "adapter_model.safetensors", "loss.csv", "loss.png", "training.json"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On so small a model more threads than one only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "train.jsonl", upper_pairs())


@pytest.fixture
def options(model: Path, data: Path, tmp_path: Path) -> Callable[..., FinetuneOptions]:
    """Options of a short run: 11 examples, batches of 4, so three steps an epoch."""

    def make(**changes: Any) -> FinetuneOptions:
        settings = {"model": str(model), "data": data, "out": tmp_path / "out", "rank": 2, "epochs": 2.0}
        return FinetuneOptions(**{**settings, "batch_size": 4, "bf16": False, "lr": 0.01, **changes})

    return make


def contents(folder: Path) -> dict[str, str]:
    """Digests of the files below ``folder``."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class InterruptionError(Exception):
    """Stands for whatever stops a run from outside."""


def stop_at(
    step: int, error: type[BaseException] = InterruptionError
) -> Callable[[int, int, float | None], None]:
    def progress(done: int, total: int, loss: float | None) -> None:
        if done == step and loss is not None:
            raise error

    return progress


def test_a_run_writes_an_adapter_and_leaves_the_model_alone(
    options: Callable[..., FinetuneOptions], model: Path
) -> None:
    before = contents(model)
    seen: list[tuple[int, int, float | None]] = []
    result = finetune(options(eval_data=options().data), lambda *step: seen.append(step))
    assert contents(model) == before
    out = options().out
    assert result.adapter == out
    assert sorted(contents(out)) == FILES
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert [(done, total) for done, total, _ in seen] == [(step, 6) for step in range(7)]
    assert seen[0][2] is None
    assert tuple(loss for _, _, loss in seen[1:]) == result.losses
    assert result.steps == 6
    assert (result.examples, result.shortened, result.left_out, result.bf16) == (11, 0, 0, False)
    record = json.loads((out / "training.json").read_text())
    assert record["result"]["losses"] == list(result.losses)
    assert record["result"]["task"] == "causal-lm"
    assert record["result"]["world_size"] == 1
    assert record["result"]["best_step"] == 6
    assert [one["step"] for one in record["result"]["evaluations"]] == [0, 3, 6]
    assert record["options"]["seed"] == 0
    assert record["versions"]["torch"] == torch.__version__
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    # q (16 x 16) and v (16 -> 8) in two layers, rank 2
    assert result.trainable == 2 * (2 * (16 + 16) + 2 * (16 + 8))
    assert result.total == result.trainable + sum(p.numel() for p in tiny_llama().parameters())
    adapter = read_adapter(out)
    assert adapter.config.target_modules == ("q_proj", "v_proj")
    assert adapter.config.base_model_name_or_path == str(model)
    assert all(pair.B.any() for pair in adapter.pairs.values())


def test_training_lowers_the_loss(options: Callable[..., FinetuneOptions]) -> None:
    result = finetune(options(epochs=20, eval_data=options().data, targets="all-linear"))
    assert result.eval_before is not None
    assert result.eval_after is not None
    assert result.eval_after < result.eval_before - 1
    assert result.losses[-1] < result.losses[0] - 1


def test_the_first_loss_is_the_base_models(options: Callable[..., FinetuneOptions], model: Path) -> None:
    """One batch of everything: its loss before the first update is the held-out loss of the same examples."""
    result = finetune(options(batch_size=11, epochs=1, eval_data=options().data, bf16=False))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = byte_tokenizer()
    total, count = 0.0, 0
    for pair in upper_pairs():
        prompt = tokenizer(f"<user>{pair['prompt']}<eos>\n<assistant>", add_special_tokens=False)["input_ids"]
        learned = tokenizer(f"{pair['completion']}<eos>", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + learned])
        with torch.no_grad():
            logits = base(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(learned), reduction="sum"))
        count += len(learned)
    assert result.learned == count
    # To three digits: enough to tell a prompt that was learned or a label off by one.
    assert f"{result.losses[0]:.3f}" == f"{result.eval_before:.3f}" == f"{total / count:.3f}"


@pytest.mark.parametrize("bf16", [False, True])
def test_the_same_options_give_the_same_bytes(
    options: Callable[..., FinetuneOptions], tmp_path: Path, bf16: bool
) -> None:
    runs: list[FinetuneResult] = []
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        torch.manual_seed(len(runs))  # what the process drew before must not matter
        runs.append(finetune(options(out=tmp_path / name, seed=seed, dropout=0.1, bf16=bf16)))
    one, same, other = (contents(run.adapter) for run in runs)
    assert one["adapter_model.safetensors"] == same["adapter_model.safetensors"]
    assert one["adapter_config.json"] == same["adapter_config.json"]
    assert one["loss.png"] == same["loss.png"]
    assert runs[0].losses == runs[1].losses
    assert one["adapter_model.safetensors"] != other["adapter_model.safetensors"]


@pytest.mark.parametrize(("save_steps", "stop"), [(1, 2), (2, 3), (3, 4), (2, 5)])
def test_a_resumed_run_ends_like_one_that_was_never_interrupted(
    options: Callable[..., FinetuneOptions], tmp_path: Path, save_steps: int, stop: int
) -> None:
    whole = finetune(options(out=tmp_path / "whole", dropout=0.1))
    changed = {"dropout": 0.1, "save_steps": save_steps}
    with pytest.raises(InterruptionError):
        finetune(options(**changed), stop_at(stop))
    assert not options().out.exists()
    torch.manual_seed(99)
    seen: list[int] = []
    resumed = finetune(options(**changed, resume=True), lambda done, *_: seen.append(done))
    saved = (stop - 1) // save_steps * save_steps
    assert seen == list(range(saved, 7))
    assert resumed.losses == whole.losses
    weights = "adapter_model.safetensors"
    assert contents(resumed.adapter)[weights] == contents(whole.adapter)[weights]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_checkpoint_holds_the_adapter_and_no_base_weight(options: Callable[..., FinetuneOptions]) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(options(save_steps=1), stop_at(3, KeyboardInterrupt))
    parent = options().out.parent
    assert [path.name for path in parent.iterdir()] == ["out.checkpoints"]
    checkpoints = parent / "out.checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "run.json"]
    names = sorted(contents(checkpoints / "checkpoint-2"))
    assert names == [*FILES[:2], "curve.json", "optimizer.safetensors"]
    assert len(read_adapter(checkpoints / "checkpoint-2").pairs) == 4


def test_resuming_with_other_options_or_data_is_refused(
    options: Callable[..., FinetuneOptions], tmp_path: Path
) -> None:
    with pytest.raises(InterruptionError):
        finetune(options(save_steps=1), stop_at(3))
    with pytest.raises(ConfigError, match=r"lr: expected 0\.01 as in the run to resume, got 0\.02"):
        finetune(options(resume=True, lr=0.02))
    other = write_lines(tmp_path / "other.jsonl", upper_pairs(5))
    kept = options().data.read_bytes()
    try:
        options().data.write_bytes(other.read_bytes())
        with pytest.raises(ConfigError, match="data_sha256"):
            finetune(options(resume=True))
    finally:
        options().data.write_bytes(kept)
    with pytest.raises(FileError, match="resume that run, or remove the folder"):
        finetune(options())
    assert finetune(options(resume=True)).steps == 6


def test_an_early_interruption_leaves_nothing(
    options: Callable[..., FinetuneOptions], tmp_path: Path
) -> None:
    for save_steps in (0, 5):
        with pytest.raises(KeyboardInterrupt):
            finetune(options(save_steps=save_steps), stop_at(3, KeyboardInterrupt))
        assert not any(tmp_path.iterdir())


def test_max_steps_and_fractions_of_an_epoch(options: Callable[..., FinetuneOptions], tmp_path: Path) -> None:
    assert finetune(options(max_steps=4)).steps == 4
    assert finetune(options(epochs=0.5, out=tmp_path / "half")).steps == 2


def test_peft_loads_what_was_trained(options: Callable[..., FinetuneOptions], model: Path) -> None:
    out = finetune(options(epochs=1, targets="attention")).adapter
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(out))
    ours = AutoModelForCausalLM.from_pretrained(model)
    load_adapter(ours, out)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in theirs.named_modules()
        if isinstance(layer, peft.tuners.lora.Linear)
    }
    assert set(layers) == set(lora_layers(ours))
    assert len(layers) == 8
    for path, layer in lora_layers(ours).items():
        own = layer.adapters["default"]
        assert torch.equal(own.lora_A, layers[path].lora_A["default"].weight)
        assert torch.equal(own.lora_B, layers[path].lora_B["default"].weight)
        assert own.scaling == layers[path].scaling["default"]


def test_divergence_is_reported_and_nothing_written(
    options: Callable[..., FinetuneOptions], tmp_path: Path
) -> None:
    with pytest.raises(NonFiniteError, match=r"^loss: .*lower the learning rate"):
        finetune(options(lr=1e38, epochs=4))
    assert not any(tmp_path.iterdir())


def test_bad_input_leaves_nothing(
    options: Callable[..., FinetuneOptions], tmp_path: Path, data: Path
) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "empty").mkdir()
    (inputs / "file").write_text("")
    (inputs / "broken").mkdir()
    (inputs / "broken" / "config.json").write_text("{}")
    broken = inputs / "bad.jsonl"
    broken.write_text('{"text": "x"}\nno\n')
    out = tmp_path / "there"
    out.mkdir()
    (out / "kept").write_text("")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"model": str(inputs / "absent")}, FileError, "absent: expected a model folder"),
        ({"model": str(inputs / "empty")}, FileError, r"without config\.json"),
        ({"model": str(inputs / "file")}, FileError, "got a file"),
        ({"model": str(inputs / "broken")}, FileError, "broken: expected a model folder"),
        ({"data": inputs / "absent"}, FileError, "JSON Lines"),
        ({"data": broken}, DataError, r"bad\.jsonl, line 2"),
        ({"eval_data": broken}, DataError, r"bad\.jsonl, line 2"),
        ({"targets": ("query",)}, TargetError, "candidates: q_proj"),
        ({"max_length": 5}, DataError, "none fits"),
        ({"out": out}, FileError, "not empty"),
        ({"out": tmp_path / "no" / "such" / "parent"}, FileError, "parent"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            finetune(options(**changes))
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "there"]
    assert [path.name for path in out.iterdir()] == ["kept"]


def test_nothing_is_printed(
    options: Callable[..., FinetuneOptions], capfd: pytest.CaptureFixture[str]
) -> None:
    finetune(options(epochs=1))
    assert capfd.readouterr() == ("", "")


def test_batches_are_grouped_by_length_and_attention_chosen_for_each(
    options: Callable[..., FinetuneOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(AttentionChoice, "choose", lambda _, length: seen.append(length))
    finetune(options(epochs=2, batch_size=2, seed=3))
    examples = encode_all(byte_tokenizer(), read_examples(options().data), 512).examples
    lengths = [len(example.input_ids) for example in examples]
    sampler = LengthGroupedSampler(lengths, 2, 3)
    expected: list[int] = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        expected += [max(lengths[i] for i in order[at : at + 2]) for at in range(0, 11, 2)]
    # Before the first step two passes of one row, for nothing.
    assert seen[2:] == expected
    assert seen[0] == seen[1] <= seen[2]


def test_the_table_is_what_was_measured(options: Callable[..., FinetuneOptions]) -> None:
    result = finetune(options(eval_data=options().data, eval_steps=2))
    rows = list(csv.DictReader((result.adapter / "loss.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(7))
    assert [float(row["loss"]) for row in rows[1:]] == list(result.losses)
    assert {int(row["step"]): float(row["eval_loss"]) for row in rows if row["eval_loss"]} == {
        one.step: one.loss for one in result.evaluations
    }
    assert [one.step for one in result.evaluations] == [0, 2, 4, 6]
    assert result.eval_before == result.evaluations[0].loss
    assert result.eval_after == result.evaluations[-1].loss
    assert result.metrics == {"perplexity": math.exp(result.evaluations[-1].loss)}


def test_early_stopping_writes_the_adapter_of_the_lowest_loss(
    options: Callable[..., FinetuneOptions], tmp_path: Path
) -> None:
    """Held out is what the data teaches to avoid, so its loss rises again."""
    held_out = write_lines(tmp_path / "held.jsonl", [{"prompt": "x", "completion": "yz"}] * 3)
    stopping = {"eval_data": held_out, "eval_steps": 1, "early_stopping_patience": 3, "lr": 0.05}
    result = finetune(options(epochs=30, warmup=0.0, schedule="constant", **stopping))
    assert result.steps == result.best_step + 3 < 90
    lowest = min(one.loss for one in result.evaluations[1:])
    assert result.eval_after == lowest
    record = json.loads((result.adapter / "training.json").read_text())["result"]
    assert (record["best_step"], record["eval_after"]) == (result.best_step, lowest)
    shorter = finetune(
        options(out=tmp_path / "short", max_steps=result.best_step, warmup=0.0, schedule="constant", lr=0.05)
    )
    weights = "adapter_model.safetensors"
    assert contents(result.adapter)[weights] == contents(shorter.adapter)[weights]


def test_a_classifier_tells_its_classes_and_metrics(
    options: Callable[..., FinetuneOptions], tmp_path: Path
) -> None:
    model = write_words_model(tmp_path / "bert", tiny_bert("BertForSequenceClassification"))
    rows = [{"text": text, "label": label} for text, label in (("aa", "low"), ("zz", "high")) * 4]
    data = write_lines(tmp_path / "classes.jsonl", rows)
    changes = {"model": str(model), "data": data, "eval_data": data, "task": "sequence-classification"}
    result = finetune(options(**changes, targets=("query", "value"), epochs=15, lr=0.02))
    assert (result.task, result.labels) == ("sequence-classification", ("high", "low"))
    assert result.metrics == {"accuracy": 1.0, "macro_f1": 1.0}
    assert result.learned == 8
    adapter = read_adapter(result.adapter)
    assert adapter.config.task_type == "SEQ_CLS"
    assert {name.rpartition(".")[2] for name in adapter.tensors} == {"weight", "bias"}


def test_a_chunked_loss_is_the_loss(options: Callable[..., FinetuneOptions], tmp_path: Path) -> None:
    plain = finetune(options(max_steps=2))
    chunked = finetune(options(max_steps=2, out=tmp_path / "chunked", chunked_loss=True))
    for one, other in zip(plain.losses, chunked.losses, strict=True):
        # Both are means over some fifty labels of sums over 264 words: roundings of another order.
        assert abs(one - other) <= float(gamma(400, unit_roundoff("float32"))) * one


def test_tensorboard_is_refused_before_anything_slow_where_it_is_not_installed(
    options: Callable[..., FinetuneOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        finetune(options(tensorboard=tmp_path / "log", model=str(tmp_path / "broken")))


def test_torchs_generator_is_left_alone(options: Callable[..., FinetuneOptions]) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    finetune(options(max_steps=1, dropout=0.1))
    assert torch.equal(state, torch.get_rng_state())
