"""Tiny random checkpoints of every architecture and head, as folders on disk, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

VOCABULARY = 264
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
GEMMA = {**DECODER, "sliding_window": 4, "query_pre_attn_scalar": 20}
SEQ2SEQ = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
#: Tokens of texts are drawn from here on; those below are special in one model or another.
FIRST_TOKEN = 3

#: The transformers class for each task, by Optimum's words.
AUTO = {
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "feature-extraction": "AutoModel",
    "text2text-generation": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class Case:
    """An architecture with a head: what makes its configuration, and Optimum's word for the head."""

    config: Callable[[], Any]
    task: str = "text-generation"


def _bert(**own: Any) -> Any:
    return hf.BertConfig(**{**SIZES, **own})


def _roberta(**own: Any) -> Any:
    # Positions are counted from padding_idx on.
    return hf.RobertaConfig(**{**SIZES, "bos_token_id": 0, "pad_token_id": 1, "type_vocab_size": 1, **own})


CASES: dict[str, Case] = {
    "llama": Case(lambda: hf.LlamaConfig(**DECODER)),
    "mistral": Case(lambda: hf.MistralConfig(**DECODER, sliding_window=4)),
    "qwen2": Case(lambda: hf.Qwen2Config(**DECODER)),
    "qwen3": Case(lambda: hf.Qwen3Config(**DECODER)),
    "gemma2": Case(lambda: hf.Gemma2Config(**GEMMA)),
    "gemma3": Case(
        lambda: hf.Gemma3TextConfig(
            **{**GEMMA, "num_hidden_layers": 3},
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "phi3": Case(lambda: hf.Phi3Config(**DECODER)),
    "gpt2": Case(
        lambda: hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "gpt_neox": Case(lambda: hf.GPTNeoXConfig(**{**SIZES, "hidden_size": 64})),
    "opt": Case(
        lambda: hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            ffn_dim=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=64,
        )
    ),
    # Modelling code that computes attention by itself; Bloom's has linear biases instead of positions.
    "bloom": Case(
        lambda: hf.BloomConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            n_layer=2,
            n_head=4,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ),
    "gptj": Case(
        lambda: hf.GPTJConfig(
            vocab_size=VOCABULARY,
            n_embd=64,
            n_layer=2,
            n_head=4,
            rotary_dim=8,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
    ),
    "mixtral": Case(lambda: hf.MixtralConfig(**DECODER, num_local_experts=4)),
    "qwen3_moe": Case(
        lambda: hf.Qwen3MoeConfig(**DECODER, num_experts=4, moe_intermediate_size=40, num_experts_per_tok=2)
    ),
    "qwen2_moe": Case(
        lambda: hf.Qwen2MoeConfig(
            **DECODER,
            num_experts=4,
            moe_intermediate_size=40,
            shared_expert_intermediate_size=32,
            num_experts_per_tok=2,
        )
    ),
    "bert": Case(_bert, "feature-extraction"),
    "bert_masked": Case(_bert, "fill-mask"),
    "bert_sequence": Case(lambda: _bert(num_labels=3), "text-classification"),
    "bert_token": Case(lambda: _bert(num_labels=5), "token-classification"),
    "bert_question": Case(_bert, "question-answering"),
    "roberta": Case(_roberta, "fill-mask"),
    "roberta_sequence": Case(lambda: _roberta(num_labels=3), "text-classification"),
    "distilbert": Case(
        lambda: hf.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=48,
            hidden_dim=80,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=128,
            num_labels=3,
        ),
        "text-classification",
    ),
    # As sentence-transformers' MiniLM models: BERT with narrow heads.
    "minilm": Case(
        lambda: _bert(num_hidden_layers=3, num_attention_heads=6, intermediate_size=192), "feature-extraction"
    ),
    "vit": Case(
        lambda: hf.ViTConfig(
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            num_labels=5,
        ),
        "image-classification",
    ),
    "llama_sequence": Case(lambda: hf.LlamaConfig(**DECODER, num_labels=3), "text-classification"),
    "t5": Case(
        lambda: hf.T5Config(
            **SEQ2SEQ, d_model=48, d_kv=16, d_ff=80, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
        "text2text-generation",
    ),
    "bart": Case(
        lambda: hf.BartConfig(
            **SEQ2SEQ,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=80,
            decoder_ffn_dim=80,
            max_position_embeddings=128,
            decoder_start_token_id=2,
        ),
        "text2text-generation",
    ),
}


def make(folder: Path, name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random checkpoint of a case to `folder`, and return it.

    Matrices are normal with a deviation of 0.15, at which attention is far from uniform; the weights of norms
    and all biases are random too: ones and zeros would hide one taken for another.
    """
    case = CASES[name]
    model = getattr(hf, AUTO[case.task]).from_config(case.config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15, generator=generator)
            else:
                lowest = -0.5 if path.endswith("bias") else 0.5
                parameter.uniform_(lowest, lowest + 1, generator=generator)
    model.to(dtype).save_pretrained(folder)
    return folder


def feeds(name: str, *, batch: int = 2, length: int = 9, seed: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs for a case by their names in transformers' forward: texts of different lengths, padded on the
    right, or images."""
    config, task = CASES[name].config(), CASES[name].task
    rng = np.random.default_rng(seed)
    if task == "image-classification":
        shape = (batch, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": rng.standard_normal(shape).astype(np.float32)}
    mask = np.ones((batch, length), np.int64)
    for row in range(1, batch):
        mask[row, max(1, length - 3 * row) :] = 0
    ids = rng.integers(FIRST_TOKEN, VOCABULARY, (batch, length))
    ids[mask == 0] = config.pad_token_id or 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if config.model_type == "bert":
        second = np.arange(length) >= length // 2
        inputs["token_type_ids"] = np.broadcast_to(second, mask.shape).astype(np.int64)
    if task == "text2text-generation":
        inputs["decoder_input_ids"] = rng.integers(FIRST_TOKEN, VOCABULARY, (batch, length - 2))
        inputs["decoder_input_ids"][:, 0] = config.decoder_start_token_id
    return inputs
