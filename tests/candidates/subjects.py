"""The models and adapters that candidates are made of, as folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from architectures import AUTO, CASES, make
from export_fixtures import SHAPE, write_tokenizer
from peft import LoraConfig as LoraSettings
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from loracle.files import Adapter, Checkpoint, LoraConfig, LoraPair, write_adapter

#: The query's weight is square, so that an update fits it either way round.
SIZES = {**SHAPE, "hidden_size": 64}
QUERY_VALUE = ("q_proj", "v_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Subject:
    """A base and adapters for it.

    Attributes:
        adapter: what candidates are said to have.
        other: a second one of the same layers.
    """

    base: Path
    adapter: Path
    other: Path


def _llama(folder: Path, dtype: torch.dtype, tied: bool) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(6.0)
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def _adapter(
    folder: Path,
    base: Path,
    targets: tuple[str, ...],
    seed: int,
    *,
    r: int,
    alpha: int,
    dtype: torch.dtype = torch.float32,
    spread: float = 0.1,
) -> Path:
    """An adapter of float32, whose numbers are those of `dtype`: a tool that casts them loses nothing."""
    rng = np.random.default_rng(seed)

    def factor(rows: int, columns: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        drawn = torch.from_numpy(rng.standard_normal((rows, columns)) * spread)
        return np.asarray(drawn.to(dtype).float().numpy())

    pairs = {}
    with Checkpoint(base) as checkpoint:
        for name in checkpoint.names:
            path = name.removesuffix(".weight")
            if path.rpartition(".")[2] in targets:
                rows, columns = checkpoint.shape(name)
                pairs[path] = LoraPair(factor(r, columns), factor(rows, r), alpha / r)
    write_adapter(folder, Adapter(LoraConfig(r=r, lora_alpha=alpha, target_modules=targets), pairs))
    return folder


def _decoder(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    factors: torch.dtype | None = None,
    tied: bool = True,
    targets: tuple[str, ...] = QUERY_VALUE,
    r: int = 8,
    alpha: int = 12,
) -> Subject:
    """With r a square, alpha / sqrt(r) may be twice alpha / r: two mistakes that look alike."""
    base = _llama(folder / "base", dtype, tied)
    own = factors or dtype
    adapter, other = (
        _adapter(folder / name, base, targets, seed, r=r, alpha=alpha, dtype=own)
        for seed, name in enumerate(("adapter", "other"), 1)
    )
    return Subject(base, adapter, other)


def _trained_with_peft(folder: Path, name: str, settings: LoraSettings) -> Subject:
    """A model of another architecture, and an adapter as PEFT saves it."""
    base = make(folder / "base", name)
    kind = getattr(transformers, AUTO[CASES[name].task])
    model = get_peft_model(kind.from_pretrained(base), settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=generator)
    model.save_pretrained(folder / "adapter")
    return Subject(base, folder / "adapter", folder / "adapter")


def _gpt2(folder: Path) -> Subject:
    """Its weights are stored (in, out), its query, key and value in one."""
    targets = ["c_attn", "c_proj", "c_fc"]
    settings = LoraSettings(
        task_type="CAUSAL_LM", r=6, lora_alpha=7, target_modules=targets, fan_in_fan_out=True
    )
    subject = _trained_with_peft(folder, "gpt2", settings)
    write_tokenizer(subject.base)
    return subject


def _classifier(folder: Path) -> Subject:
    """A BERT; its head is trained along."""
    targets = ["query", "value", "dense"]
    settings = LoraSettings(task_type="SEQ_CLS", r=6, lora_alpha=7, target_modules=targets)
    return _trained_with_peft(folder, "bert_sequence", settings)


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "float32": _decoder,
    "bfloat16": partial(_decoder, dtype=torch.bfloat16),
    "float16": partial(_decoder, dtype=torch.float16),
    "bfloat16, float32 adapter": partial(_decoder, dtype=torch.bfloat16, factors=torch.float32),
    "float32, all linear": partial(_decoder, tied=False, targets=ALL_LINEAR, r=6, alpha=7),
    "bfloat16, all linear": partial(
        _decoder, dtype=torch.bfloat16, tied=False, targets=ALL_LINEAR, r=6, alpha=7
    ),
    "float32, r=4": partial(_decoder, r=4, alpha=6),
    "GPT-2": _gpt2,
    "BERT classifier": _classifier,
}
"""What makes each, in a folder of its own. All but the last two are Llama models; those that do not say
"all linear" have tied embeddings and an adapter of query and value."""


def real(model: Path, folder: Path) -> Subject:
    """SmolLM2-135M-Instruct and random adapters of query and value, of r=8."""
    adapter, other = (
        _adapter(folder / name, model, QUERY_VALUE, seed, r=8, alpha=16, spread=0.02)
        for seed, name in enumerate(("adapter", "other"), 1)
    )
    return Subject(model, adapter, other)
