"""Tiny decoders with tokenizers, and adapters for them, as folders on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from loracle.files import Adapter, LoraConfig, LoraPair, write_adapter

VOCABULARY = 264
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
CONFIGS = {
    "llama": lambda tied: LlamaConfig(**SHAPE, tie_word_embeddings=tied),
    "mistral": lambda tied: MistralConfig(**SHAPE, tie_word_embeddings=tied, sliding_window=None),
    "qwen2": lambda tied: Qwen2Config(**SHAPE, tie_word_embeddings=tied),
}
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """Every byte a token, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def make_model(
    folder: Path, kind: str = "llama", *, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """A random decoder of `kind` in `folder`. Norm weights and biases are random too: ones and zeros would
    hide one taken for another."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](tied))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            else:
                parameter.mul_(4.0)  # the default spread of 0.02 leaves attention nearly uniform
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def make_adapter(
    folder: Path,
    model: Path,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    *,
    r: int = 4,
    alpha: int = 8,
    seed: int = 1,
) -> Path:
    """A random PEFT adapter of `model`'s shapes, large enough to change every answer."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    rng = np.random.default_rng(seed)
    pairs = {
        f"model.layers.{layer}.{path}": LoraPair(
            (rng.standard_normal((r, shape[1])) * 0.1).astype(np.float32),
            (rng.standard_normal((shape[0], r)) * 0.1).astype(np.float32),
            alpha / r,
        )
        for layer in range(config["num_hidden_layers"])
        for path, shape in shapes.items()
        if path.split(".")[1] in targets
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, Adapter(LoraConfig(r=r, lora_alpha=alpha, target_modules=targets), pairs))
    return folder
