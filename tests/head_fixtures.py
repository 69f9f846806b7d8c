"""Small checkpoints without the head of a classifier, and adapters that bring it, by loracle and by PEFT."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model

from loracle.files import read_adapter, write_adapter
from loracle.torch_impl import LoraConfig, inject, load_adapter, merge_and_unload, save_adapter

LABELS = ("no", "perhaps", "yes")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
DISTIL = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "pad_token_id": 0}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "eos_token_id": 3}
IMAGE = {
    "image_size": 8,
    "patch_size": 4,
    **{k: v for k, v in SIZES.items() if "hidden" in k or "inter" in k},
}


@dataclass(frozen=True)
class Case:
    """A checkpoint's class, and what an adapter is trained in.

    Attributes:
        base: makes the model whose checkpoint is the base.
        auto: transformers' class of the classifier.
        task: PEFT's ``task_type``.
        targets: of the adapter.
        saved: ``modules_to_save`` that PEFT needs besides its own.
    """

    base: Callable[[], Any]
    auto: str
    task: str | None
    targets: tuple[str, ...]
    saved: tuple[str, ...] = ()


SEQUENCE, TOKEN = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
ATTENTION = ("query", "value", "attention.output.dense")

CASES = {
    "BertModel": Case(lambda: hf.BertModel(hf.BertConfig(**SIZES)), SEQUENCE, "SEQ_CLS", ATTENTION),
    "BertForMaskedLM": Case(
        lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)), SEQUENCE, "SEQ_CLS", ATTENTION, ("bert.pooler",)
    ),
    "BertModel, tokens": Case(lambda: hf.BertModel(hf.BertConfig(**SIZES)), TOKEN, "TOKEN_CLS", ATTENTION),
    "RobertaModel": Case(lambda: hf.RobertaModel(hf.RobertaConfig(**SIZES)), SEQUENCE, "SEQ_CLS", ATTENTION),
    "RobertaForMaskedLM": Case(
        lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES)), TOKEN, "TOKEN_CLS", ATTENTION
    ),
    "DistilBertModel": Case(
        lambda: hf.DistilBertModel(hf.DistilBertConfig(**DISTIL)), SEQUENCE, "SEQ_CLS", ("q_lin", "v_lin")
    ),
    "DistilBertForMaskedLM": Case(
        lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(**DISTIL)), TOKEN, "TOKEN_CLS", ("q_lin",)
    ),
    "GPT2Model": Case(lambda: hf.GPT2Model(hf.GPT2Config(**GPT2)), SEQUENCE, "SEQ_CLS", ("c_attn",)),
    "GPT2LMHeadModel": Case(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), TOKEN, "TOKEN_CLS", ("c_attn",)
    ),
    "LlamaForCausalLM": Case(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, "tie_word_embeddings": False})),
        SEQUENCE,
        "SEQ_CLS",
        ("q_proj", "down_proj"),
    ),
    "LlamaModel": Case(lambda: hf.LlamaModel(hf.LlamaConfig(**SIZES)), TOKEN, "TOKEN_CLS", ("q_proj",)),
    "OPTModel": Case(
        lambda: hf.OPTModel(hf.OPTConfig(**{**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16})),
        SEQUENCE,
        "SEQ_CLS",
        ("q_proj",),
    ),
    "BartForConditionalGeneration": Case(
        lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=40,
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                max_position_embeddings=32,
            )
        ),
        SEQUENCE,
        "SEQ_CLS",
        ("q_proj",),
        ("classification_head",),
    ),
    "T5ForConditionalGeneration": Case(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=40,
                d_model=16,
                d_kv=4,
                d_ff=24,
                num_layers=1,
                num_heads=4,
                eos_token_id=2,
                decoder_start_token_id=0,
                tie_word_embeddings=False,
            )
        ),
        SEQUENCE,
        "SEQ_CLS",
        ("q",),
        ("classification_head",),
    ),
    "ViTModel": Case(
        lambda: hf.ViTModel(hf.ViTConfig(**IMAGE, num_attention_heads=4)),
        "AutoModelForImageClassification",
        None,
        ("q_proj", "v_proj"),
        ("classifier",),
    ),
}


def write_base(folder: Path, case: Case, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = case.base()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


def classifier(folder: Path, case: Case, **options: Any) -> Any:
    """A classifier with a head at random, made from the checkpoint."""
    torch.manual_seed(1)
    return getattr(hf, case.auto).from_pretrained(folder, **{"num_labels": len(LABELS), **options}).eval()


def named(model: Any) -> Any:
    """Give the model's classes names, and a padding token where it has none."""
    model.config.id2label = dict(enumerate(LABELS))
    model.config.label2id = {label: number for number, label in enumerate(LABELS)}
    if getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = 3
    return model


def randomize(model: Any) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)


def our_adapter(base: Path, case: Case, out: Path) -> Path:
    """An adapter as a training loop with loracle saves it."""
    model = named(classifier(base, case))
    saved = case.saved or None
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=case.targets, task_type=case.task, modules_to_save=saved
    )
    inject(model, config)
    randomize(model)
    save_adapter(model, out)
    return out


def pefts_adapter(base: Path, case: Case, out: Path) -> Path:
    saved = list(case.saved) or None
    config = PeftLoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=list(case.targets),
        task_type=case.task,
        modules_to_save=saved,
        fan_in_fan_out="c_attn" in case.targets,
    )
    tuned = get_peft_model(classifier(base, case), config)
    randomize(tuned)
    tuned.save_pretrained(str(out))
    return out


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    if hasattr(model.config, "image_size"):
        return {"pixel_values": torch.randn(2, 3, 8, 8, dtype=model.dtype)}
    ids = torch.randint(4, 40, (1 if model.config.pad_token_id is None else 2, 7))
    ids[:, -1] = 2  # BART's last token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs_of(model)).logits
    return found


def load_merged(folder: Path, case: Case, **options: Any) -> Any:
    """The classifier in a folder, which transformers must load whole, with nothing left over."""
    model, report = getattr(hf, case.auto).from_pretrained(folder, output_loading_info=True, **options)
    assert {key: list(value) for key, value in report.items() if value} == {}
    return model


def heads_of(adapter: Path) -> dict[str, Any]:
    """The adapter's whole tensors."""
    return dict(read_adapter(adapter).tensors)


def rewrite(folder: Path, out: Path, **changes: Any) -> Path:
    """Write an adapter again, with other parts."""
    write_adapter(out, replace(read_adapter(folder), **changes))
    return out


def load_unmerged(base: Path, case: Case, adapter: Path) -> Any:
    """transformers' own merge, for its bits."""
    model = classifier(base, case, ignore_mismatched_sizes=True)
    load_adapter(model, adapter)
    merge_and_unload(model)
    return model
