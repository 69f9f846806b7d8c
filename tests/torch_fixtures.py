"""Small models, a tokenizer and training data for the tests of ``loracle.torch_impl``."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<eos>"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKS = ("<system>", "<user>", "<assistant>")


def tiny_llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A Llama model of two layers with random weights large enough to matter, in evaluation mode."""
    sizes: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 260,
        "bos_token_id": None,
        "eos_token_id": 260,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).eval()


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes and a few marks; its chat template ends a turn with `EOS` and a newline."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: at for at, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", *MARKS, EOS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token=EOS)
    fast.chat_template = template
    return fast


def write_model(folder: Path, seed: int = 0, **options: Any) -> Path:
    """A folder with `tiny_llama` and `byte_tokenizer`."""
    tiny_llama(seed, **options).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def upper_pairs(count: int = 11) -> list[dict[str, str]]:
    """Prompts of different lengths, each completed by itself in capitals."""
    words = ["a", "be", "cat", "door", "eagle", "forest", "giraffe", "hi", "island", "jump", "kite"]
    return [{"prompt": f"{words[i % 11]} {i}", "completion": words[i % 11].upper()} for i in range(count)]


class Chain(nn.Module):
    """Linear layers in a row under the names of an attention block, of small integers: exact arithmetic."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q_proj = nn.Linear(3, 4, dtype=dtype)
        self.k_proj = nn.Linear(4, 3, bias=False, dtype=dtype)
        self.v_proj = nn.Linear(3, 2, dtype=dtype)
        fill_integers(self, seed=0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., 3) to (..., 2)."""
        result: Tensor = self.v_proj(self.k_proj(self.q_proj(x)))
        return result


def fill_integers(module: nn.Module, seed: int, bound: int = 2) -> None:
    """Set every parameter to integers in [-bound, bound]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randint(-bound, bound + 1, parameter.shape, generator=generator)
            parameter.copy_(values)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, one dtype and the same bits; it tells -0.0 from 0.0."""
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(integers), b.detach().contiguous().view(integers))
