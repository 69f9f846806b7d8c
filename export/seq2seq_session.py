"""An exported encoder and decoder in onnxruntime: the source is encoded once, its keys and values are
computed once, and a step appends in place and binds nothing.

Needs onnxruntime and NumPy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from loracle.reference import ConfigError, ShapeError

from .host_inputs import HostInputs
from .names import (
    ATTENTION_MASK,
    ENCODER_MASK,
    ENCODER_STATES,
    INPUT_IDS,
    LAST_HIDDEN_STATE,
    LOGITS,
    PAST_LENGTH,
    cross_names,
)
from .opening import DTYPES
from .prompts import padded, require_one_a_row, require_rows
from .providers import CPU, device_of
from .seq2seq_model import Seq2SeqModel, open_seq2seq

Array = np.ndarray[Any, Any]


class Seq2SeqSession:
    """Targets for a batch of sources, all rows in step.

    The keys and values of the encoder's states stay where the decoder's first step left them. Those of the
    target are one buffer (rows, heads, capacity, size) a layer, bound both as `past` and as `present`: the
    attention operator appends to it in place, at the position that `past_length` tells.

    Args:
        source: folder of the exported model, or the model opened (`open_seq2seq`).
        capacity: most tokens of a target, those it begins with included.
        threads: onnxruntime's threads; 0 leaves the choice to it.
        batch: number of rows.

    Attributes:
        length: tokens of each row's target; 0 before the first `prefill`.
        rows: rows that are still computed, see `keep`.
        start: the tokens that every target begins with.

    Raises:
        ConfigError: capacity or batch is not positive, or the capacity larger than the model's positions.
    """

    def __init__(
        self, source: str | Path | Seq2SeqModel, capacity: int, *, threads: int = 0, batch: int = 1
    ) -> None:
        if batch < 1:
            raise ConfigError(f"batch: expected at least 1 row, got {batch}")
        model = source if isinstance(source, Seq2SeqModel) else open_seq2seq(source, threads)
        self.start = model.start
        if capacity < len(self.start):
            raise ConfigError(
                f"capacity: expected at least {len(self.start)}, what a target begins with, got {capacity}"
            )
        if model.positions is not None and capacity > model.positions:
            raise ConfigError(
                f"capacity: expected at most the model's {model.positions} positions, got {capacity}"
            )
        self.model = model
        self.capacity = capacity
        self.batch = batch
        logits = next(entry for entry in model.later.get_outputs() if entry.name == LOGITS)
        self.dtype = DTYPES[logits.type]
        self.vocabulary = int(logits.shape[-1])
        self._device = device_of(model.later)
        self._own, self._cross = _cache_names(model.layers)
        self.rows = 0
        self.length = 0

    def require_room(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        """Raise ShapeError where the capacity has no room for answers of so many tokens to any sources."""
        needed = len(self.start) + new_tokens - 1  # the last token is not read
        if needed > self.capacity:
            raise ShapeError(
                f"capacity: expected at least {needed} for a target's start and {new_tokens} new tokens, "
                f"got {self.capacity}; open the session with a larger capacity"
            )

    def prefill(self, prompts: Sequence[Sequence[int] | Array]) -> Array:
        """Forget the rows, encode a source for each, and begin their targets.

        Args:
            prompts: for each row its source's tokens, at least one; shorter sources are padded on the right.

        Returns:
            logits (batch, vocabulary) after the tokens that a target begins with.

        Raises:
            ShapeError: another number of sources than rows, an empty one, or more tokens than positions.
            DataError: a token that the model does not have.
        """
        tokens, mask = padded(
            prompts,
            self.batch,
            self.model.positions,
            self.vocabulary,
            left=False,
            remedy="give it some text" if self.model.positions is None else "shorten the text",
        )
        (states,) = self._run(
            self.model.encoder, {INPUT_IDS: tokens, ATTENTION_MASK: mask}, {}, [LAST_HIDDEN_STATE]
        )
        begun = np.tile(np.array(self.start, np.int64), (self.batch, 1))
        logits, *present = self._run(
            self.model.first,
            {INPUT_IDS: begun, ENCODER_MASK: mask},
            {ENCODER_STATES: states},
            [LOGITS, *(name for _, name in (*self._own, *self._cross))],
        )
        own, cross = present[: len(self._own)], present[len(self._own) :]
        self._bind([self._buffer(value.numpy()) for value in own], cross, mask)
        self.length = len(self.start)
        last: Array = logits.numpy()[:, -1]
        return last

    def decode(self, tokens: Array | Sequence[int]) -> Array:
        """Append one token to each row's target.

        Args:
            tokens: (rows,) integers.

        Returns:
            logits (rows, vocabulary) in the model's dtype; the next call overwrites them.

        Raises:
            ShapeError: no `prefill` came before, another number of tokens than rows, or the capacity has no
                room for one more.
        """
        if not self.rows:
            raise ShapeError("tokens: expected a prefill before them, got none")
        require_one_a_row(tokens, self.rows)
        if self.length == self.capacity:
            raise ShapeError(
                f"tokens: expected at most {self.capacity} in a target, got one more; "
                "open the session with a larger capacity"
            )
        self._tokens[:, 0] = tokens
        self._past_length[0] = self.length
        self._inputs.send()
        self.model.later.run_with_iobinding(self._binding)
        self.length += 1
        return self._logits

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows alone, in this order: `decode` takes and returns that many.

        Costs a copy of their keys and values.

        Raises:
            ShapeError: no row, or one that is not there.
        """
        require_rows(rows, self.rows)
        chosen = list(rows)
        own = self._host_cache or [value.numpy() for value in self._cache]
        cross = [self._value(np.ascontiguousarray(value.numpy()[chosen])) for value in self._given]
        self._bind([np.ascontiguousarray(array[chosen]) for array in own], cross, self._mask[chosen])

    def _bind(self, own: list[Array], cross: list[onnxruntime.OrtValue], mask: Array) -> None:
        """Take these as the keys and values of targets and of sources; bind all that a step needs."""
        self.rows = mask.shape[0]
        self._mask, self._given = mask, cross
        # On the CPU an OrtValue is its array, which has to be kept.
        self._host_cache = own if self._device == CPU else []
        self._cache = [self._value(array) for array in own]
        self._binding = binding = self.model.later.io_binding()
        for (past, present), value in zip(self._own, self._cache, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        for (past, _), value in zip(self._cross, cross, strict=True):
            binding.bind_ortvalue_input(past, value)
        self._tokens = np.zeros((self.rows, 1), np.int64)
        self._past_length = np.zeros(1, np.int64)
        self._inputs = HostInputs(self._device)
        self._inputs.bind(binding, INPUT_IDS, self._tokens)
        binding.bind_cpu_input(ENCODER_MASK, mask)
        # `bind_cpu_input` does not know the inputs that need not be given.
        binding.bind_ortvalue_input(PAST_LENGTH, onnxruntime.OrtValue.ortvalue_from_numpy(self._past_length))
        logits = np.empty((self.rows, 1, self.vocabulary), self.dtype)
        # NumPy owns the buffer: an array taken from an OrtValue would not keep its memory alive.
        binding.bind_output(LOGITS, "cpu", 0, self.dtype, list(logits.shape), logits.ctypes.data)
        self._logits = logits[:, 0]

    def _buffer(self, present: Array) -> Array:
        """Room for `capacity` tokens, those of `present` (rows, heads, n, size) first."""
        rows, heads, length, size = present.shape
        buffer = np.zeros((rows, heads, self.capacity, size), present.dtype)
        buffer[:, :, :length] = present
        return buffer

    def _value(self, array: Array) -> onnxruntime.OrtValue:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def _run(
        self,
        session: onnxruntime.InferenceSession,
        arrays: dict[str, Array],
        values: dict[str, onnxruntime.OrtValue],
        outputs: Sequence[str],
    ) -> list[onnxruntime.OrtValue]:
        """The outputs of a graph; all but logits stay on the device."""
        binding = session.io_binding()
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, "cpu" if name == LOGITS else self._device, 0)
        session.run_with_iobinding(binding)
        found: list[onnxruntime.OrtValue] = binding.get_outputs()
        return found


def _cache_names(layers: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Names among inputs and outputs of the target's keys and values, and of the source's."""
    names: dict[str, list[tuple[str, str]]] = {"decoder": [], "encoder": []}
    past, present = cross_names("past_key_values", layers), cross_names("present", layers)
    for (side, given), (_, made) in zip(past, present, strict=True):
        names[side].append((given, made))
    return names["decoder"], names["encoder"]
