"""Checkpoints of Llama's architecture with seeded weights, written shard by shard: to measure sizes with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from loracle.files.safetensors_writer import safetensors_header, write_array

SHARD_BYTES = 2 * 2**30
"""A shard ends with the tensor that makes it this large."""

_BLOCK = 2**24
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_Tensor = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a model, by the names of transformers' configuration; the head is a weight of its own."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int = 32_000
    max_position_embeddings: int = 2048

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def tensors(self) -> Iterator[_Tensor]:
        """Name and shape of each tensor, in the order of the checkpoint."""
        hidden, inner, vocabulary = self.hidden_size, self.intermediate_size, self.vocab_size
        queries, keys = (
            heads * self.head_dim for heads in (self.num_attention_heads, self.num_key_value_heads)
        )
        yield "model.embed_tokens.weight", (vocabulary, hidden)
        for layer in range(self.num_hidden_layers):
            path = f"model.layers.{layer}"
            yield f"{path}.input_layernorm.weight", (hidden,)
            yield f"{path}.self_attn.q_proj.weight", (queries, hidden)
            yield f"{path}.self_attn.k_proj.weight", (keys, hidden)
            yield f"{path}.self_attn.v_proj.weight", (keys, hidden)
            yield f"{path}.self_attn.o_proj.weight", (hidden, queries)
            yield f"{path}.post_attention_layernorm.weight", (hidden,)
            yield f"{path}.mlp.gate_proj.weight", (inner, hidden)
            yield f"{path}.mlp.up_proj.weight", (inner, hidden)
            yield f"{path}.mlp.down_proj.weight", (hidden, inner)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (vocabulary, hidden)


def write_llama(folder: Path, shape: LlamaShape, dtype: str = "float32", *, seed: int = 0) -> Path:
    """Write a model folder: matrices of spread 0.02, norms of ones, a tokenizer whose tokens are bytes.

    Args:
        folder: made.
        dtype: "float32" or "bfloat16".

    A block of one tensor is in memory at a time.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shards = list(_shards(shape, _DTYPES[dtype].itemsize))
    places: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= {name: file for name, _ in tensors}
        _write_shard(folder / file, tensors, _DTYPES[dtype], rng)
    count = sum(math.prod(size) for _, size in shape.tensors())
    index = {"metadata": {"total_size": count * _DTYPES[dtype].itemsize}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(shape, dtype), indent=2))
    _write_tokenizer(folder)
    return folder


def _shards(shape: LlamaShape, itemsize: int) -> Iterator[list[_Tensor]]:
    tensors: list[_Tensor] = []
    size = 0
    for name, dims in shape.tensors():
        tensors.append((name, dims))
        size += math.prod(dims) * itemsize
        if size >= SHARD_BYTES:
            yield tensors
            tensors, size = [], 0
    if tensors:
        yield tensors


def _write_shard(path: Path, tensors: list[_Tensor], dtype: np.dtype[Any], rng: np.random.Generator) -> None:
    layout = [(name, dtype, dims) for name, dims in tensors]
    with path.open("xb") as file:
        file.write(safetensors_header(layout, {"format": "pt"}))
        for _, dims in tensors:
            if len(dims) == 1:
                write_array(file, np.ones(dims, dtype))
                continue
            count = math.prod(dims)
            for start in range(0, count, _BLOCK):
                block = rng.standard_normal(min(_BLOCK, count - start), dtype=np.float32)
                block *= np.float32(0.02)
                write_array(file, block.astype(dtype, copy=False))


def _config(shape: LlamaShape, dtype: str) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    more = ("intermediate_size", "vocab_size", "max_position_embeddings")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: getattr(shape, name) for name in (*names, *more)},
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
        "dtype": dtype,
    }


def _write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: place for place, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
