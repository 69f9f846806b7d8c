"""Checkpoints that are wrong, each in one way. Each fault: `Parts` -> tensors by name that take the places
of the right ones; None where a tensor is to be left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from loracle.files import read_adapter

from .merges import by_loracle
from .subjects import Subject
from .tensors import read, write

Q0, V0, K0 = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qvk")
Q1, V1 = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qv")
UP0, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ADDED = "model.layers.0.self_attn.q_proj.bias"


@dataclass(frozen=True)
class Parts:
    """What faults are made of.

    Attributes:
        base: the base's tensors, `right` the correctly rounded merge's.
        deltas: exact updates in float64, by the names of weights; `others` those of another adapter.
        scaling: alpha / r.
    """

    base: Mapping[str, Tensor]
    right: Mapping[str, Tensor]
    deltas: Mapping[str, Tensor]
    others: Mapping[str, Tensor]
    r: int
    scaling: float

    def times(self, factor: float) -> Changes:
        """All updates scaled anew."""
        return self.merged({name: factor * delta for name, delta in self.deltas.items()})

    def merged(self, deltas: Mapping[str, Tensor]) -> Changes:
        """Updates added to the base's weights, and rounded."""
        return {
            name: (self.base[name].double() + delta).to(self.base[name].dtype)
            for name, delta in deltas.items()
        }


Changes = dict[str, Tensor | None]
Fault = Callable[[Parts], Changes]


def _deltas(adapter: Path) -> tuple[dict[str, Tensor], int, float]:
    pairs = read_adapter(adapter).pairs
    deltas = {}
    for path, pair in pairs.items():
        A, B = (torch.from_numpy(factor).double() for factor in (pair.A, pair.B))
        deltas[f"{path}.weight"] = pair.scaling * B @ A
    first = next(iter(pairs.values()))
    return deltas, len(first.A), first.scaling


def sabotaged(subject: Subject, out: Path, fault: Fault) -> Path:
    """The right merge as a checkpoint, with a fault."""
    by_loracle(subject.base, subject.adapter, out.with_name(f"{out.name} right"))
    right = read(out.with_name(f"{out.name} right"))
    deltas, r, scaling = _deltas(subject.adapter)
    others, _, _ = _deltas(subject.other)
    parts = Parts(read(subject.base), right, deltas, others, r, scaling)
    tensors = {**right, **fault(parts)}
    return write(out, {name: value for name, value in tensors.items() if value is not None}, subject.base)


def missing_in_one_layer(parts: Parts) -> Changes:
    return {V1: parts.base[V1]}


def missing_everywhere(parts: Parts) -> Changes:
    return {name: parts.base[name] for name in parts.deltas}


def another_adapter(parts: Parts) -> Changes:
    return parts.merged(parts.others)


def another_on_top(parts: Parts) -> Changes:
    return parts.merged({name: delta + parts.others[name] for name, delta in parts.deltas.items()})


def of_the_layer_before(parts: Parts) -> Changes:
    return parts.merged({Q1: parts.deltas[Q0]})


def layers_exchanged(parts: Parts) -> Changes:
    return {Q0: parts.right[Q1], Q1: parts.right[Q0]}


def transposed(parts: Parts) -> Changes:
    return parts.merged({name: delta.T for name, delta in parts.deltas.items() if name in (Q0, Q1)})


def key_and_value_exchanged(parts: Parts) -> Changes:
    return {K0: parts.right[V0], V0: parts.right[K0]}


def _one_entry(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    changed = tensor.clone()
    flat = changed.view(-1)
    flat[-7] = change(flat[-7])
    return changed


def _bit_flipped(value: Tensor, bit: int) -> Tensor:
    kind = {2: torch.int16, 4: torch.int32}[value.element_size()]
    return (value.view(kind) ^ (1 << bit)).view(value.dtype)


def last_bit_flipped(parts: Parts, name: str) -> Changes:
    return {name: _one_entry(parts.right[name], partial(_bit_flipped, bit=0))}


def high_bit_flipped(parts: Parts) -> Changes:
    """The highest bit of the fraction."""
    fraction = {torch.float32: 22, torch.bfloat16: 6, torch.float16: 9}[parts.right[V1].dtype]
    return {V1: _one_entry(parts.right[V1], partial(_bit_flipped, bit=fraction))}


def not_a_number(parts: Parts, name: str) -> Changes:
    return {name: _one_entry(parts.right[name], lambda value: torch.full_like(value, torch.nan))}


def infinite(parts: Parts) -> Changes:
    return {V1: _one_entry(parts.right[V1], lambda value: torch.full_like(value, torch.inf))}


def _noisy(tensor: Tensor, size: float) -> Tensor:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    return (tensor.float() * (1 + size * noise)).to(tensor.dtype)


def noise_in_an_untouched(parts: Parts) -> Changes:
    return {UP0: _noisy(parts.right[UP0], 0.02)}


def noise_in_a_merged(parts: Parts) -> Changes:
    return {V1: _noisy(parts.right[V1], 0.05)}


def nothing_but_noise(parts: Parts) -> Changes:
    """Numbers of the right size."""
    right = parts.right[V1]
    drawn = torch.randn(right.shape, generator=torch.Generator().manual_seed(0))
    return {V1: (drawn * right.float().std()).to(right.dtype)}


def untouched_through_bfloat16(parts: Parts) -> Changes:
    return {UP0: parts.right[UP0].bfloat16().to(parts.right[UP0].dtype)}


def merged_through_bfloat16(parts: Parts) -> Changes:
    return {V1: parts.right[V1].bfloat16().to(parts.right[V1].dtype)}


def norm_of_ones(parts: Parts) -> Changes:
    return {NORM: torch.ones_like(parts.right[NORM])}


def one_token_trained(parts: Parts) -> Changes:
    """A row of the embedding that differs, as of a token that was trained along."""
    embedding = parts.right[EMBEDDING].clone()
    embedding[65] *= 1.5
    return {EMBEDDING: embedding}


def tied_pair_broken(parts: Parts) -> Changes:
    return {HEAD: _noisy(parts.right[EMBEDDING], 0.02)}


def tied_pair_stored_twice(parts: Parts) -> Changes:
    return {HEAD: parts.right[EMBEDDING].clone()}


def absent(parts: Parts, name: str) -> Changes:
    return {name: None}


def added(parts: Parts) -> Changes:
    return {ADDED: torch.zeros(len(parts.right[Q0]), dtype=parts.right[Q0].dtype)}


def more_tokens(parts: Parts) -> Changes:
    embedding = parts.right[EMBEDDING]
    return {EMBEDDING: torch.cat([embedding, embedding[:8]])}


def transposed_weight(parts: Parts) -> Changes:
    return {V1: parts.right[V1].T.contiguous()}


def other_dtype(parts: Parts) -> Changes:
    return {V1: parts.right[V1].double()}


def shape_of_a_vector(parts: Parts) -> Changes:
    return {V1: parts.right[V1].reshape(-1)}


def scaled(parts: Parts, by: Callable[[Parts], float]) -> Changes:
    return parts.times(by(parts))


def merged_twice(subject: Subject, out: Path) -> Path:
    """The adapter merged into its own merge."""
    first = by_loracle(subject.base, subject.adapter, out.with_name(f"{out.name} once"))
    return by_loracle(first, subject.adapter, out)


def with_alpha(subject: Subject, out: Path, alpha: int) -> Path:
    """The merge of an adapter whose configuration was edited."""
    edited = out.with_name(f"{out.name} adapter")
    edited.mkdir()
    for path in subject.adapter.iterdir():
        (edited / path.name).write_bytes(path.read_bytes())
    config = json.loads((edited / "adapter_config.json").read_text())
    (edited / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": alpha}))
    return by_loracle(subject.base, edited, out)
