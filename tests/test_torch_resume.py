"""A run that is killed, wherever, and resumed ends in the bytes of one that was not."""

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed_runs import Kill, run
from task_fixtures import tiny_bert, write_words_model
from torch_fixtures import upper_pairs, write_lines, write_model

from loracle.files.json_file import read_json_object

SAVE_STEPS = 3
COMMON = {
    "rank": 2,
    "bf16": False,
    "dropout": 0.2,
    "loraplus_ratio": 4.0,
    "weight_decay": 0.01,
    "gradient_accumulation": 2,
    "eval_steps": 2,
    "early_stopping_patience": 2,
    "save_steps": SAVE_STEPS,
}

Options = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def stopping(root: Path) -> tuple[Options, dict[str, Any]]:
    """Packed examples of a causal model, and the whole run: it stops early, and its best step, neither the
    last nor a checkpoint's, comes after two checkpoints. The first seed of which this is true."""
    model = write_model(root / "llama")
    data = write_lines(root / "pairs.jsonl", upper_pairs(22))
    held_out = write_lines(root / "held.jsonl", [{"prompt": "x", "completion": "yz"}] * 3)
    settings = {"model": str(model), "data": data, "eval_data": held_out, "packing": True, "max_length": 64}
    settings |= {"batch_size": 1, "epochs": 6.0, "lr": 0.05}
    settings |= {"targets": "all-linear"}
    for seed in range(11, 31):

        def options(name: str, seed: int = seed) -> dict[str, Any]:
            return {**COMMON, **settings, "seed": seed, "out": root / name}

        assert run(options(f"seed {seed}")) == 0
        whole = outcome(root / f"seed {seed}")
        best, steps = whole["result"]["best_step"], whole["result"]["steps"]
        if best % SAVE_STEPS and 2 * SAVE_STEPS < best < steps < 18:
            return options, whole
    raise AssertionError("no seed of twenty stops early where it should")


@pytest.fixture(scope="module")
def packed(stopping: tuple[Options, dict[str, Any]]) -> Options:
    return stopping[0]


@pytest.fixture(scope="module")
def whole_packed(stopping: tuple[Options, dict[str, Any]]) -> dict[str, Any]:
    return stopping[1]


@pytest.fixture(scope="module")
def masked(root: Path) -> Options:
    """Tokens hidden anew in each epoch; it trains to the end."""
    model = write_words_model(root / "bert", tiny_bert())
    texts = [{"text": f"{word * (1 + n % 3)} {n}"} for n, word in enumerate(["abc", "bca", "cabb"] * 5)]
    data = write_lines(root / "texts.jsonl", texts)
    settings = {"model": str(model), "data": data, "eval_data": data, "task": "masked-lm", "epochs": 3.0}
    settings |= {"batch_size": 2, "lr": 0.01, "targets": ("query", "value")}
    return lambda name: {**COMMON, **settings, "out": root / name}


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions."""
    record = read_json_object(folder / "training.json")["result"]
    assert isinstance(record, dict)
    record = {name: value for name, value in record.items() if name != "seconds"}
    files = ("adapter_config.json", "adapter_model.safetensors", "loss.csv", "loss.png")
    return {**{name: (folder / name).read_bytes() for name in files}, "result": record}


def killed_and_resumed(options: Options, name: str, *kills: Kill) -> dict[str, Any]:
    """Run with each of ``kills`` in turn, resuming, then to the end."""
    settings = options(name)
    out: Path = settings["out"]
    for kill in kills:
        assert run({**settings, "resume": True}, kill) == -signal.SIGKILL
        assert not out.exists()
    assert run({**settings, "resume": True}) == 0
    assert not out.with_name(f"{name}.checkpoints").exists()
    return outcome(out)


@pytest.fixture(scope="module")
def whole_masked(masked: Options) -> dict[str, Any]:
    assert run(masked("whole masked")) == 0
    return outcome(masked("whole masked")["out"])


def test_the_runs_have_what_resuming_could_lose(
    whole_packed: dict[str, Any], whole_masked: dict[str, Any]
) -> None:
    """A best step that is not the last, and several epochs."""
    result = whole_packed["result"]
    assert result["steps"] - result["best_step"] == 2 * COMMON["early_stopping_patience"]
    assert max(one["step"] for one in result["evaluations"]) == result["steps"]
    assert whole_masked["result"]["steps"] > 3 * SAVE_STEPS


PLACES = [
    Kill("step", 1),
    Kill("optimizer file", 2 * SAVE_STEPS),
    Kill("rename", SAVE_STEPS),
    Kill("removal", 3 * SAVE_STEPS),
    Kill("output"),
]


@pytest.mark.parametrize("kill", PLACES, ids=lambda kill: f"{kill.place}-{kill.step}")
def test_killed_anywhere(packed: Options, whole_packed: dict[str, Any], kill: Kill) -> None:
    assert killed_and_resumed(packed, f"{kill.place} {kill.step}", kill) == whole_packed


def test_killed_between_the_best_step_and_the_end(packed: Options, whole_packed: dict[str, Any]) -> None:
    """A checkpoint has the best adapter beside its own."""
    last = whole_packed["result"]["steps"] - 1
    assert last // SAVE_STEPS * SAVE_STEPS > whole_packed["result"]["best_step"]
    assert killed_and_resumed(packed, "after the best", Kill("step", last)) == whole_packed


def test_killed_twice_at_random_steps(
    packed: Options, whole_packed: dict[str, Any], masked: Options, whole_masked: dict[str, Any]
) -> None:
    rng = random.Random(5)
    for options, whole in ((packed, whole_packed), (masked, whole_masked)):
        first = rng.randrange(2, 7)
        second = rng.randrange(first + SAVE_STEPS, whole["result"]["steps"])
        kills = (Kill("step", first), Kill("step", second))
        assert killed_and_resumed(options, f"twice {whole is whole_masked}", *kills) == whole


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 13))
@pytest.mark.parametrize("place", ["step", "optimizer file", "rename", "removal"])
def test_killed_at_every_step(masked: Options, whole_masked: dict[str, Any], place: Any, step: int) -> None:
    if place != "step" and (step % SAVE_STEPS or (place == "removal" and step == SAVE_STEPS)):
        pytest.skip("no checkpoint to interrupt there")
    assert killed_and_resumed(masked, f"every {place} {step}", Kill(place, step)) == whole_masked
