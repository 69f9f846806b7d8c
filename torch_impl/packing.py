"""Several examples in one row, none of which sees another."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loracle.reference import ConfigError

from .batches import IGNORED, Columns
from .encoding import Encoded

Mode = Literal["positions", "mask"]

_LENGTH = 4
"""Tokens of an example that a model is tried on."""


@dataclass(frozen=True)
class Packed:
    """Examples one behind the other; positions restart at 0 with each, and its first token is never a label.

    The label of a token is compared with the prediction at the token before it, which for a first token is
    another example's.
    """

    examples: tuple[Encoded, ...]

    @property
    def input_ids(self) -> tuple[int, ...]:
        """All tokens."""
        return tuple(token for one in self.examples for token in one.input_ids)

    @property
    def labels(self) -> tuple[int, ...]:
        """The labels, as long as the tokens."""
        return tuple(label for one in self.examples for label in (IGNORED, *one.labels[1:]))

    @property
    def position_ids(self) -> tuple[int, ...]:
        """Each token's place in its example, from 0."""
        return tuple(place for one in self.examples for place in range(len(one.input_ids)))

    @property
    def shortened(self) -> bool:
        """Whether an example was cut to fit."""
        return any(one.shortened for one in self.examples)

    @property
    def learned(self) -> int:
        """How many tokens a loss is taken on: as many as of the examples unpacked."""
        return sum(one.learned for one in self.examples)

    def columns(self) -> Columns:
        """Return the inputs of a model; positions that restart stand for an ``attention_mask``."""
        return {"input_ids": self.input_ids, "labels": self.labels, "position_ids": self.position_ids}


def pack(examples: Sequence[Encoded], max_length: int) -> tuple[Packed, ...]:
    """Distribute examples of at most ``max_length`` tokens over rows of at most ``max_length`` tokens.

    Best fit, the longest first: each example goes to the fullest row that still has room for it, of equally
    full ones the oldest, else to a new row; at most 11/9 of the fewest rows possible, and four rows more.
    Deterministic: equal examples in equal order give equal rows.

    Source: D. S. Johnson and others, Worst-case performance bounds for simple one-dimensional packing
    algorithms, SIAM Journal on Computing 3 (1974).
    """
    lengths = [len(one.input_ids) for one in examples]
    rows: list[list[int]] = []
    # The rows that have n tokens left, a heap for each n; bit n of `open_rooms` tells whether there is one.
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    open_rooms = 0
    for index in sorted(range(len(examples)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        assert 1 <= length <= max_length, (length, max_length)
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = heappop(with_room[room])
            if not with_room[room]:
                open_rooms ^= 1 << room
        else:
            row, room = len(rows), max_length
            rows.append([])
        rows[row].append(index)
        heappush(with_room[room - length], row)
        open_rooms |= 1 << (room - length)
    return tuple(Packed(tuple(examples[index] for index in sorted(row))) for row in rows)


def packing_mode(model: nn.Module) -> Mode:
    """Return how to keep packed examples apart in ``model``, found by trying on one row of two examples.

    ``"positions"``: positions that restart, and no mask, from which transformers' own masks (and its flash
    attention) tell where an example starts; it needs ``use_cache=False``. ``"mask"``: positions and the
    4-D mask of `border_mask`. The trial changes the first example's tokens: where the logits of the second
    one keep all their bits, it does not see the first.

    Raises:
        ConfigError: the model takes no ``position_ids``, or counts them from another number than 0, or the
            second example sees the first either way, as in a recurrent model, or in one whose layers have a
            window that a mask of ours would replace.
    """
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"packing: expected a model that takes position_ids, got {name}, which does not; "
            "train without packing"
        )
    if not _counts_from_zero(model):
        raise ConfigError(
            f"packing: expected a model that counts positions from 0, got {name}, which does not; "
            "train without packing"
        )
    modes: tuple[Mode, ...] = ("positions", "mask")
    config: Any = getattr(model, "config", None)
    for mode in modes:
        windowed = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        if not (mode == "mask" and windowed) and _keeps_apart(model, mode):
            return mode
    raise ConfigError(
        f"packing: expected a model in which packed examples do not see each other, got {name}, in which the "
        "second example's logits depend on the first; train without packing"
    )


def packed_inputs(inputs: Mapping[str, Tensor], mode: Mode, dtype: torch.dtype) -> dict[str, Any]:
    """Return a packed batch's inputs with what ``mode`` needs beside them."""
    apart = {**inputs, "use_cache": False}
    if mode == "mask":
        apart["attention_mask"] = border_mask(inputs["position_ids"], dtype)
    return apart


def border_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention's scores, (batch, 1, length, length) of ``dtype``: 0 where a token
    may see another, its example's up to itself, and the lowest finite number elsewhere.

    Args:
        position_ids: (batch, length), integers; an example starts at each 0.
        dtype: floating-point.
    """
    example = (position_ids == 0).cumsum(dim=-1)
    same = example[:, :, None] == example[:, None, :]
    length = position_ids.shape[-1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
    mask = torch.zeros(same.shape, dtype=dtype, device=position_ids.device)
    return mask.masked_fill_(~(same & earlier), torch.finfo(dtype).min)[:, None]


def _counts_from_zero(model: nn.Module) -> bool:
    """Try whether the model gives a row the positions 0, 1, 2, ... where it is given none."""
    ids = _trial_tokens(model)[None, :_LENGTH]
    position_ids = torch.arange(_LENGTH)[None]
    return torch.equal(
        _trial(model, {"input_ids": ids, "use_cache": False}),
        _trial(model, {"input_ids": ids, "position_ids": position_ids, "use_cache": False}),
    )


def _keeps_apart(model: nn.Module, mode: Mode) -> bool:
    """Try whether the second example's logits stay the same bits when the first one's tokens change."""
    tokens = _trial_tokens(model)
    position_ids = torch.arange(_LENGTH).repeat(2)[None]
    dtype = next(model.parameters()).dtype
    logits = []
    for first in (tokens[:_LENGTH], tokens[_LENGTH : 2 * _LENGTH]):
        inputs = {"input_ids": torch.cat([first, tokens[-_LENGTH:]])[None], "position_ids": position_ids}
        logits.append(_trial(model, packed_inputs(inputs, mode, dtype)))
    changed = not torch.equal(logits[0][:_LENGTH], logits[1][:_LENGTH])
    return changed and torch.equal(logits[0][_LENGTH:], logits[1][_LENGTH:])


def _trial_tokens(model: nn.Module) -> Tensor:
    """Return tokens that lie far apart, so that they do not all have one vector, as reserved tokens may."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    last = int(embeddings.num_embeddings) - 1
    return torch.tensor([place * last // (2 * _LENGTH) for place in range(2 * _LENGTH + 1)])


@torch.no_grad()
def _trial(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return the logits of one row, (length, vocabulary), in evaluation mode."""
    device = next(model.parameters()).device
    moved = {name: one.to(device) if isinstance(one, Tensor) else one for name, one in inputs.items()}
    training = model.training
    model.eval()
    try:
        logits: Tensor = model(**moved).logits[0]
    finally:
        model.train(training)
    return logits
