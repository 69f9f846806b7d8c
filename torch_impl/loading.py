"""A task's model and its tokenizer, from a folder or, where a hub is reachable, by name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from loracle.reference import ConfigError, FileError

from .labels import Labels
from .tasks import CAUSAL_LM, Task

_POSITIONS = ("position_embeddings", "embed_positions", "wpe")

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware; elsewhere they are slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) is True for name in ("avx512_bf16", "amx_bf16", "bf16"))


def check_model_source(source: str) -> None:
    """Refuse what is neither a model folder nor the form of a hub's name, before anything slow is done.

    Raises:
        FileError: the folder is missing, or has no ``config.json``.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileError(f"{folder}: expected a model folder, got one without config.json; check --model")
    elif folder.exists() or not _HUB_NAME.fullmatch(source):
        found = "a file" if folder.exists() else "nothing there"
        raise FileError(f"{folder}: expected a model folder, got {found}; check --model")


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off stderr, which belongs to the caller."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars, reports and warnings off stderr; its errors are raised anyway."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_progress_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)


@dataclass(frozen=True)
class LoadedModel:
    """A task's model.

    Attributes:
        model: of transformers, on the CPU.
        tokenizer: its tokenizer.
        labels: the classes as the model numbers them; None where the task has none.
        modules_to_save: the modules to train in full beside adapters, PEFT's name for them: a classifier's
            head, and a pooler that the checkpoint lacks.
    """

    model: Any
    tokenizer: Any
    labels: Labels | None
    modules_to_save: tuple[str, ...]

    def longest(self, max_length: int) -> int:
        """Return ``max_length``, or the number of positions that the model has vectors for, if it is less."""
        counts = [max_length]
        for path, module in self.model.named_modules():
            if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _POSITIONS:
                # BART's first two, and RoBERTa's up to that of padding, are no positions.
                padding = module.padding_idx
                unused = int(getattr(module, "offset", 0)) + (0 if padding is None else padding + 1)
                counts.append(module.num_embeddings - unused)
        return min(counts)

    @property
    def token_types(self) -> bool:
        """Whether the model tells a text from its pair by ``token_type_ids``."""
        return (getattr(self.model.config, "type_vocab_size", None) or 0) > 1


def load_model(
    source: str, *, bf16: bool, task: Task = CAUSAL_LM, labels: Labels | None = None, seed: int = 0
) -> LoadedModel:
    """Return the model of a task and its tokenizer.

    The weights are float32, or bfloat16 where the checkpoint's are and ``bf16`` is on: widening them would
    change no product; a head that is trained is float32. Nothing is written to a folder that ``source``
    names.

    A task with classes gets a head for them: from the checkpoint what fits, the rest as the model's class
    starts it, drawn from ``seed``. The classes keep the numbers that the checkpoint gives them, where it has
    the same names; the model's configuration tells them (``id2label``). A classifier of sequences that knows
    no padding token, such as GPT-2, pads with its end-of-sequence token: it looks at the last token that is
    not padding.

    Args:
        source: a folder, or a name on a hub that can be reached.
        bf16: keep bfloat16 weights.
        task: what the model is for.
        labels: the classes, where the task has some.
        seed: of what the checkpoint lacks.

    Raises:
        FileError: there is no such model, its files cannot be read, or a weight is missing that the task
            does not add.
        ConfigError: the model's architecture has no such task.
    """
    import transformers

    check_model_source(source)
    local = Path(source).is_dir()
    auto = getattr(transformers, task.auto_class)
    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=local)
        _check_architecture(auto, config, task)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
        if labels is not None:
            labels = labels.in_order_of(config.id2label)
            config.id2label, config.label2id = labels.id2label, labels.label2id
            config.problem_type = "single_label_classification" if "labelled" in task.forms else None
        _agree_on_padding(config, tokenizer, task)
        stored = getattr(config, "dtype", None)
        dtype = torch.bfloat16 if bf16 and stored in (torch.bfloat16, "bfloat16") else torch.float32
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, report = auto.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                local_files_only=local,
                output_loading_info=True,
                ignore_mismatched_sizes=task.classes,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        what = "a model folder" if local else "a folder, or a model's name on a hub that can be reached"
        raise FileError(f"{source}: expected {what}, got: {' '.join(str(error).split())}") from error
    head = _head(model) if task.classes else ()
    drawn = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    modules = (*head, *_added_pooler(model, drawn)) if task.classes else ()
    # transformers would go on with random numbers in their place.
    missing = sorted(name for name in drawn if not name.startswith(tuple(f"{path}." for path in modules)))
    if missing:
        raise FileError(
            f"{source}: expected the weight {missing[0]}, got a checkpoint without it or with another shape; "
            "was the copy complete?"
        )
    for path in modules:
        model.get_submodule(path).float()
    return LoadedModel(model, tokenizer, labels, modules)


def _check_architecture(auto: Any, config: Any, task: Task) -> None:
    if type(config) not in auto._model_mapping:
        raise ConfigError(
            f"task: expected a model that transformers knows for {task.name}, got one of type "
            f"{config.model_type}; choose another task or model"
        )


def _agree_on_padding(config: Any, tokenizer: Any, task: Task) -> None:
    """Let the tokenizer pad with what the model takes for padding; give a classifier that has none one."""
    text: Any = config.get_text_config()
    known = text.pad_token_id is not None and 0 <= text.pad_token_id < len(tokenizer)
    if not known and "labelled" in task.forms:
        own = tokenizer.pad_token_id
        text.pad_token_id = tokenizer.eos_token_id if own is None else own
        known = text.pad_token_id is not None
        if not known:
            raise ConfigError(
                "task: expected a tokenizer with a padding or an end-of-sequence token for "
                f"{task.name}, got one without; give it one"
            )
    if known and tokenizer.pad_token_id != text.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(text.pad_token_id)


def _head(model: Any) -> tuple[str, ...]:
    """Return the modules with weights beside the model's body."""
    body = model.base_model
    found = tuple(
        name
        for name, child in model.named_children()
        if child is not body and next(child.parameters(), None) is not None
    )
    if body is model or not found:
        raise ConfigError(
            f"task: expected a model with a body and a head for its classes, got {type(model).__name__}; "
            "choose another model"
        )
    return found


def _added_pooler(model: Any, drawn: set[str]) -> tuple[str, ...]:
    """Return the body's pooler where the checkpoint lacks it, as one of a masked language model does.

    Frozen at random numbers that no file holds, it would make the adapter useless elsewhere.
    """
    path = f"{model.base_model_prefix}.pooler"
    return (path,) if any(name.startswith(f"{path}.") for name in drawn) else ()
