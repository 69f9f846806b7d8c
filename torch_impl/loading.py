"""A causal language model and its tokenizer, from a folder or, where a hub is reachable, by name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from loracle.reference import FileError

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


def load_model(source: str, *, bf16: bool) -> tuple[Any, Any]:
    """Return (model, tokenizer), the model on the CPU.

    The weights are float32, or bfloat16 where the checkpoint's are and ``bf16`` is on: widening them would
    change no product. Nothing is written to a folder that ``source`` names.

    Raises:
        FileError: there is no such model, or its files cannot be read.
    """
    import transformers

    check_model_source(source)
    local = Path(source).is_dir()
    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=local)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
        stored = getattr(config, "dtype", None)
        dtype = torch.bfloat16 if bf16 and stored in (torch.bfloat16, "bfloat16") else torch.float32
        with quiet_transformers():
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=dtype, local_files_only=local, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        what = "a model folder" if local else "a folder, or a model's name on a hub that can be reached"
        raise FileError(f"{source}: expected {what}, got: {error}") from error
    # transformers would go on with random numbers in their place.
    if report["missing_keys"]:
        raise FileError(
            f"{source}: expected the weight {min(report['missing_keys'])}, got a checkpoint without it; "
            "was the copy complete?"
        )
    return model, tokenizer
