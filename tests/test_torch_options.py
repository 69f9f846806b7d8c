"""Options are checked when they are made, and name what decides a run."""

from pathlib import Path
from typing import Any

import pytest

from loracle.reference import ConfigError
from loracle.torch_impl import FinetuneOptions

REQUIRED: dict[str, Any] = {"model": "m", "data": "d", "out": "o"}

WRONG: list[tuple[str, Any]] = [
    ("rank", 0),
    ("rank", 1.5),
    ("alpha", float("nan")),
    ("epochs", 0),
    ("epochs", float("inf")),
    ("max_steps", 0),
    ("lr", 0.0),
    ("lr", float("nan")),
    ("schedule", "constant"),
    ("warmup", 1.0),
    ("warmup", -0.1),
    ("batch_size", 0),
    ("batch_size", True),
    ("max_length", 1),
    ("seed", -1),
    ("dropout", 1.0),
    ("save_steps", -1),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_named(name: str, value: Any) -> None:
    described = {"rank": "^r:", "alpha": "lora_alpha", "dropout": "lora_dropout"}.get(name, name)
    with pytest.raises(ConfigError, match=described):
        FinetuneOptions(**REQUIRED, **{name: value})


def test_paths_may_be_given_as_strings() -> None:
    options = FinetuneOptions(**REQUIRED, eval_data="e")  # type: ignore[arg-type]
    assert (options.data, options.out, options.eval_data) == (Path("d"), Path("o"), Path("e"))


def test_the_adapter_is_configured_by_the_options() -> None:
    config = FinetuneOptions(**REQUIRED, rank=4, alpha=12.0, dropout=0.5, targets=("up_proj",)).lora_config()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 12.0, 0.5)
    assert config.target_modules == ("up_proj",)
    assert config.base_model_name_or_path == "m"


DECISIVE: list[tuple[str, Any]] = [
    ("model", "n"),
    ("rank", 2),
    ("alpha", 1.0),
    ("targets", ("k_proj",)),
    ("epochs", 1.0),
    ("max_steps", 7),
    ("lr", 1.0),
    ("schedule", "cosine"),
    ("warmup", 0.5),
    ("batch_size", 1),
    ("max_length", 9),
    ("seed", 5),
    ("dropout", 0.1),
    ("bf16", True),
]


@pytest.mark.parametrize(("name", "value"), DECISIVE)
def test_what_decides_the_run_is_part_of_its_identity(name: str, value: Any) -> None:
    assert FinetuneOptions(**{**REQUIRED, name: value}).identity() != FinetuneOptions(**REQUIRED).identity()


@pytest.mark.parametrize(("name", "value"), [("out", "p"), ("resume", True), ("save_steps", 3)])
def test_what_does_not_is_not(name: str, value: Any) -> None:
    assert FinetuneOptions(**{**REQUIRED, name: value}).identity() == FinetuneOptions(**REQUIRED).identity()
