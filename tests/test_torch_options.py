"""Options are checked when they are made, and name what decides a run."""

from pathlib import Path
from typing import Any

import pytest

from loracle.reference import AdamWOptions, ConfigError
from loracle.torch_impl import FinetuneOptions
from loracle.torch_impl.optimizer import LoraPlus
from loracle.torch_impl.tasks import task_named

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
    ("schedule", "polynomial"),
    ("task", "translation"),
    ("loraplus_ratio", 0.0),
    ("loraplus_ratio", float("inf")),
    ("loraplus_lr_embedding", -1.0),
    ("weight_decay", -0.1),
    ("adam_beta1", 1.0),
    ("adam_beta2", -0.1),
    ("adam_epsilon", float("nan")),
    ("max_grad_norm", -1.0),
    ("gradient_accumulation", 0),
    ("mask_probability", 0.0),
    ("mask_probability", 1.0),
    ("eval_steps", 0),
    ("eval_steps", 2),
    ("early_stopping_patience", 0),
    ("early_stopping_patience", 2),
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
    options = FinetuneOptions(**REQUIRED, eval_data="e", tensorboard="t")  # type: ignore[arg-type]
    assert (options.data, options.out, options.eval_data) == (Path("d"), Path("o"), Path("e"))
    assert options.tensorboard == Path("t")


def test_what_belongs_to_causal_models_is_refused_elsewhere() -> None:
    for name in ("packing", "chunked_loss"):
        FinetuneOptions(**REQUIRED, **{name: True})
        with pytest.raises(ConfigError, match=f"^{name}: expected task causal-lm, got masked-lm"):
            FinetuneOptions(**REQUIRED, task="masked-lm", **{name: True})


def test_compiling_and_sharding_exclude_each_other() -> None:
    for name in ("torch_compile", "fsdp"):
        FinetuneOptions(**REQUIRED, **{name: True})
    with pytest.raises(ConfigError, match=r"^torch_compile: expected fsdp False"):
        FinetuneOptions(**REQUIRED, torch_compile=True, fsdp=True)


def test_evaluations_need_held_out_data() -> None:
    for name in ("eval_steps", "early_stopping_patience"):
        FinetuneOptions(**REQUIRED, eval_data=Path("e"), **{name: 2})
        with pytest.raises(ConfigError, match=f"^{name}: expected eval_data"):
            FinetuneOptions(**REQUIRED, **{name: 2})


def test_the_optimizers_numbers_are_the_options() -> None:
    numbers = {"lr": 0.5, "adam_beta1": 0.1, "adam_beta2": 0.2, "adam_epsilon": 0.3, "weight_decay": 0.4}
    options = FinetuneOptions(**REQUIRED, **numbers, loraplus_ratio=8.0, loraplus_lr_embedding=0.7)
    assert options.adamw() == AdamWOptions(0.5, (0.1, 0.2), 0.3, 0.4)
    assert options.loraplus() == LoraPlus(8.0, 0.7)
    plain = FinetuneOptions(**REQUIRED)
    assert plain.adamw() == AdamWOptions(2e-3, weight_decay=0.0)
    assert plain.loraplus() is None


@pytest.mark.parametrize(
    ("task", "peft"),
    [
        ("causal-lm", "CAUSAL_LM"),
        ("masked-lm", None),
        ("sequence-classification", "SEQ_CLS"),
        ("token-classification", "TOKEN_CLS"),
        ("seq2seq-lm", "SEQ_2_SEQ_LM"),
    ],
)
def test_the_configuration_has_pefts_name_of_the_task(task: Any, peft: str | None) -> None:
    assert FinetuneOptions(**REQUIRED, task=task).lora_config().task_type == peft
    assert task_named(task).peft_type == peft


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
    ("task", "masked-lm"),
    ("loraplus_ratio", 2.0),
    ("loraplus_lr_embedding", 0.5),
    ("weight_decay", 0.1),
    ("adam_beta1", 0.5),
    ("adam_beta2", 0.5),
    ("adam_epsilon", 0.1),
    ("max_grad_norm", 0.0),
    ("gradient_accumulation", 2),
    ("gradient_checkpointing", True),
    ("chunked_loss", True),
    ("torch_compile", True),
    ("packing", True),
    ("mask_probability", 0.5),
    ("fsdp", True),
    ("eval_data", Path("e")),
]


@pytest.mark.parametrize(("name", "value"), DECISIVE)
def test_what_decides_the_run_is_part_of_its_identity(name: str, value: Any) -> None:
    assert FinetuneOptions(**{**REQUIRED, name: value}).identity() != FinetuneOptions(**REQUIRED).identity()


@pytest.mark.parametrize(
    ("name", "value"), [("out", "p"), ("resume", True), ("save_steps", 3), ("tensorboard", "t")]
)
def test_what_does_not_is_not(name: str, value: Any) -> None:
    assert FinetuneOptions(**{**REQUIRED, name: value}).identity() == FinetuneOptions(**REQUIRED).identity()
