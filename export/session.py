"""An exported decoder in onnxruntime: keys and values are appended in place, and a step binds nothing.

Needs onnxruntime and NumPy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from loracle.reference import ConfigError, FileError, ShapeError

from .context import check_capacity
from .host_inputs import HostInputs
from .names import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    past_names,
    present_names,
)
from .opening import DTYPES, grows, open_session
from .prompts import padded, require_one_a_row, require_rows
from .providers import CPU, device_of

Array = np.ndarray[Any, Any]

# While tokens come one by one the mask has columns to spare, and grows by this many: onnxruntime plans its
# memory anew for every new shape, which costs as much as several steps of a small model.
_COLUMNS = 128


class DecoderSession:
    """One text, or a batch of texts in step, through an exported decoder.

    The cache of each layer is one buffer (rows, kv_heads, capacity, head_size), bound both as `past` and as
    `present`: the attention operator appends to it in place. What a step of one token a row reads and writes
    is bound once; the token and one more column of the mask are written into the bound arrays, and from
    there, where the session runs on a device, into the memory that is bound there.

    Args:
        source: folder of the exported model, or a session opened on it.
        capacity: most tokens of a row, prompt and answer together.
        threads: onnxruntime's threads; 0 leaves the choice to it.
        batch: number of rows.
        weights: of a task, by the names of the graph's inputs; the others are the base's.

    Attributes:
        length: tokens of the longest row.
        rows: rows that are still computed, see `keep`.
    """

    _grows = False

    def __init__(
        self,
        source: str | Path | onnxruntime.InferenceSession,
        capacity: int,
        *,
        threads: int = 0,
        batch: int = 1,
        weights: Mapping[str, onnxruntime.OrtValue] | None = None,
    ) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity: expected at least 1 token, got {capacity}")
        if batch < 1:
            raise ConfigError(f"batch: expected at least 1 row, got {batch}")
        if isinstance(source, onnxruntime.InferenceSession):
            session = source
        else:
            check_capacity(source, capacity)
            session = open_session(source, threads)
        if grows(session) is not self._grows:
            raise FileError(
                f"cache: expected one that {'grows' if self._grows else 'is appended to in place'}, got the "
                "other kind; open the model with open_decoder"
            )
        inputs = {entry.name: entry for entry in session.get_inputs()}
        outputs = {entry.name: entry for entry in session.get_outputs()}
        self._past, self._present = _cache_names(list(inputs), list(outputs))
        first = inputs[self._past[0]]
        for name, kind in ((self._past[0], first.type), (LOGITS, outputs[LOGITS].type)):
            if kind not in DTYPES:
                raise FileError(
                    f"{name}: expected one of {', '.join(DTYPES)}, got {kind}; export in fp32 or fp16"
                )
        self.session = session
        self.capacity = capacity
        self.batch = batch
        self.dtype = DTYPES[outputs[LOGITS].type]
        self.vocabulary = int(outputs[LOGITS].shape[-1])
        self._device = device_of(session)
        self._weights = weights or {}
        self._keeps_last = LOGITS_TO_KEEP in inputs or any(
            entry.name == LOGITS_TO_KEEP for entry in session.get_overridable_initializers()
        )
        self._cache_shape = (batch, int(first.shape[1]), capacity, int(first.shape[3]))
        self._cache_dtype = DTYPES[first.type]
        self._mask = np.zeros(batch * capacity, np.int64)
        self.rows = 0
        self.reset()

    def reset(self) -> None:
        """Forget the texts; every row is computed again."""
        if self.rows != self.batch:
            self._bind(list(np.zeros((len(self._past), *self._cache_shape), self._cache_dtype)))
        self.length = 0
        self._padding = np.zeros(self.rows, np.int64)
        self._width = 0

    def _bind(self, cache: list[Array]) -> None:
        """Take these arrays, or copies of them on the device, as the cache; bind all that stays."""
        self.rows = cache[0].shape[0]
        self._host_cache = cache if self._device == CPU else []
        self._cache = [onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, 0) for array in cache]
        self._binding = self._new_binding()
        self._inputs = HostInputs(self._device)
        for past, present, value in zip(self._past, self._present, self._cache, strict=True):
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
        self._tokens = np.zeros((self.rows, 1), np.int64)
        self._token_column = self._tokens[:, 0]
        self._step_output = np.empty((self.rows, 1, self.vocabulary), self.dtype)
        self._step_logits = self._step_output[:, 0]
        self._width = 0

    def _bind_step(self) -> None:
        """Bind what a step of one token a row reads and writes, but for the mask."""
        self._inputs.bind(self._binding, INPUT_IDS, self._tokens)
        self._bind_logits(self._step_output)

    def _bind_logits(self, logits: Array) -> None:
        """Let the next run write logits (rows, n, vocabulary) of the last n tokens."""
        if self._keeps_last:
            self._binding.bind_ortvalue_input(LOGITS_TO_KEEP, _number(logits.shape[1]))
        # NumPy owns the buffer: an array taken from an OrtValue would not keep its memory alive.
        self._binding.bind_output(LOGITS, "cpu", 0, self.dtype, list(logits.shape), logits.ctypes.data)

    def _new_binding(self) -> onnxruntime.IOBinding:
        """A binding that has the task's weights."""
        binding = self.session.io_binding()
        for name, value in self._weights.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def switch(self, weights: Mapping[str, onnxruntime.OrtValue]) -> bool:
        """Go on with another task's weights, with the same cache: its texts are forgotten.

        Returns:
            whether that was possible: where the names are others than before, nothing has changed.
        """
        if weights.keys() != self._weights.keys():
            return False
        self._weights = weights
        self._rebind()
        self.reset()
        return True

    def _rebind(self) -> None:
        """Bind the task's weights in the place of another's."""
        for name, value in self._weights.items():
            self._binding.bind_ortvalue_input(name, value)

    def require_room(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        """Raise ShapeError where the capacity has no room for the prompts and their answers."""
        needed = max(map(len, prompts), default=0) + new_tokens - 1  # the last token is not read
        if needed > self.capacity:
            raise ShapeError(
                f"capacity: expected at least {needed} for the longest prompt and {new_tokens} new tokens, "
                f"got {self.capacity}; open the session with a larger capacity"
            )

    def prefill(self, prompts: Sequence[Sequence[int] | Array]) -> Array:
        """Forget the texts and begin each row with a prompt.

        Shorter prompts are padded on the left, so that the last position is every row's last token, and no
        other position's logits are computed.

        Args:
            prompts: for each row its tokens, at least one.

        Returns:
            logits (batch, vocabulary) after each prompt's last token.

        Raises:
            ShapeError: another number of prompts than rows, an empty prompt, or one longer than the capacity.
            DataError: a token that the model does not have.
        """
        tokens, mask = padded(
            prompts,
            self.batch,
            self.capacity,
            self.vocabulary,
            left=True,
            remedy="open the session with a larger capacity",
        )
        self.reset()
        logits: Array = self._run(tokens, mask, last_only=True)[:, -1]
        self.length = tokens.shape[1]
        self._padding = self.length - mask.sum(1)
        return logits

    def step(self, ids: Array) -> Array:
        """Append tokens to the only row and return the logits of each.

        Args:
            ids: (n,) integers, the tokens that follow those already given.

        Returns:
            logits (n, vocabulary) in the model's dtype; the next call of one token may overwrite them.

        Raises:
            ShapeError: no token, more than the capacity has room for, or several rows.
        """
        if self.rows != 1:
            raise ShapeError(f"step: expected a session of one row, got {self.rows}; use prefill and decode")
        count = int(ids.shape[0])
        if count == 1:
            return self.decode(ids)
        end = self.length + count
        if count == 0 or end > self.capacity:
            raise self._no_room(count)
        logits: Array = self._run(
            np.ascontiguousarray(ids, np.int64)[None], np.ones((1, end), np.int64), last_only=False
        )[0]
        self.length = end
        return logits

    def decode(self, tokens: Array | Sequence[int]) -> Array:
        """Append one token to each row.

        Args:
            tokens: (rows,) integers.

        Returns:
            logits (rows, vocabulary) in the model's dtype; the next call overwrites them.

        Raises:
            ShapeError: another number of tokens than rows, or the capacity has no room for one more.
        """
        require_one_a_row(tokens, self.rows)
        end = self.length + 1
        if end > self._width:
            if not self._width:
                self._bind_step()
            self._widen(end)
        self._token_column[:] = tokens
        self._mask[self._columns] = 1
        self._columns -= 1
        self._inputs.send()
        self.session.run_with_iobinding(self._binding)
        self.length = end
        return self._step_logits

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows alone, in this order: `decode` takes and returns that many.

        Costs a copy of their cache. Where the longest text is dropped its room in the capacity is free again.

        Raises:
            ShapeError: no row, or one that is not there.
        """
        require_rows(rows, self.rows)
        chosen = list(rows)
        cache = self._host_cache or [value.numpy() for value in self._cache]
        self._bind([np.ascontiguousarray(array[chosen]) for array in cache])
        padding = self._padding[chosen]
        self.length -= int(padding.min())
        self._padding = padding - padding.min()

    def _widen(self, end: int) -> None:
        """Bind a mask with room for more tokens: in each row ones on the right, as many as it has tokens."""
        if end > self.capacity:
            raise self._no_room(1)
        self._width = min(self.capacity, -(-end // _COLUMNS) * _COLUMNS)
        self._wide_mask = self._mask[: self.rows * self._width].reshape(self.rows, self._width)
        free = self._width - (self.length - self._padding)
        self._wide_mask[:] = np.arange(self._width) >= free[:, None]
        self._columns = np.arange(self.rows) * self._width + free - 1
        self._inputs.bind(self._binding, ATTENTION_MASK, self._wide_mask)

    def _no_room(self, count: int) -> ShapeError:
        return ShapeError(
            f"input_ids: expected 1 to {self.capacity - self.length} more tokens, got {count}; "
            "open the session with a larger capacity"
        )

    def _run(self, tokens: Array, mask: Array, *, last_only: bool) -> Array:
        """Logits (rows, n, vocabulary) of new tokens (rows, n); (rows, 1, vocabulary) where `last_only` and
        the graph can."""
        self._binding.bind_cpu_input(INPUT_IDS, tokens)
        self._binding.bind_cpu_input(ATTENTION_MASK, mask)
        count = 1 if last_only and self._keeps_last else tokens.shape[1]
        logits = np.empty((self.rows, count, self.vocabulary), self.dtype)
        self._bind_logits(logits)
        self.session.run_with_iobinding(self._binding)
        self._width = 0  # the step's arrays are no longer bound
        return logits


def _number(value: int) -> onnxruntime.OrtValue:
    """An int64 tensor (1,). `bind_cpu_input` does not know the inputs that need not be given."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.array([value], np.int64))


def _cache_names(inputs: list[str], outputs: list[str]) -> tuple[list[str], list[str]]:
    """Names of the cache among the inputs and among the outputs.

    Raises FileError where the graph is no decoder, or wants an input that a session does not give.
    """
    layers = sum(name.endswith(".key") for name in inputs)
    past, present = past_names(layers), present_names(layers)
    known = (INPUT_IDS, ATTENTION_MASK, *past)
    missing = [name for name in known if name not in inputs]
    missing += [name for name in (LOGITS, *present) if name not in outputs]
    if missing or layers == 0:
        raise FileError(
            f"{missing[0] if missing else 'past_key_values.0.key'}: expected among the model's inputs "
            "and outputs, found none; is this a decoder with a key-value cache?"
        )
    unknown = [name for name in inputs if name not in (*known, LOGITS_TO_KEEP)]
    if unknown:
        raise FileError(
            f"{unknown[0]}: expected no input but tokens, mask and cache, found one; "
            "export with `loracle export`"
        )
    return past, present
