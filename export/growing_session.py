"""A decoder whose cache grows, in onnxruntime: what a step returns is the next step's past."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from .context import check_capacity
from .names import ATTENTION_MASK, INPUT_IDS, LOGITS
from .opening import grows, open_session
from .prompts import require_one_a_row, require_rows
from .session import Array, DecoderSession


class GrowingSession(DecoderSession):
    """Like `DecoderSession`, for a graph whose cache grows.

    The keys and values that a step returns stay where onnxruntime has made them, and are bound as the past of
    the next step. `attention_mask` has a column for each place of the cache.
    """

    _grows = True

    def reset(self) -> None:
        """Forget the texts; every row is computed again."""
        rows, kv_heads, _, width = self._cache_shape
        empty = np.zeros((rows, kv_heads, 0, width), self._cache_dtype)
        self._set_past([empty] * len(self._past))
        self.length = 0
        self._padding = np.zeros(self.rows, np.int64)

    def _rebind(self) -> None:
        """Every run has a binding of its own."""

    def decode(self, tokens: Array | Sequence[int]) -> Array:
        """Append one token to each row; see `DecoderSession.decode`."""
        require_one_a_row(tokens, self.rows)
        end = self.length + 1
        if end > self.capacity:
            raise self._no_room(1)
        mask = (np.arange(end) >= self._padding[:, None]).astype(np.int64)
        ids = np.asarray(tokens, np.int64).reshape(self.rows, 1)
        logits: Array = self._run(ids, mask, last_only=True)[:, -1]
        self.length = end
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows alone, in this order; see `DecoderSession.keep`."""
        require_rows(rows, self.rows)
        chosen = list(rows)
        padding = self._padding[chosen]
        spare = int(padding.min())
        self._set_past([np.ascontiguousarray(value.numpy()[chosen][:, :, spare:]) for value in self._cache])
        self.length -= spare
        self._padding = padding - spare

    def _set_past(self, cache: Sequence[Array]) -> None:
        self.rows = cache[0].shape[0]
        self._cache = [onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, 0) for array in cache]

    def _run(self, tokens: Array, mask: Array, *, last_only: bool) -> Array:
        """Logits (rows, n, vocabulary) of new tokens (rows, n)."""
        binding = self._new_binding()
        binding.bind_cpu_input(INPUT_IDS, tokens)
        binding.bind_cpu_input(ATTENTION_MASK, mask)
        for past, present, value in zip(self._past, self._present, self._cache, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_output(present, self._device)
        logits = np.empty((self.rows, tokens.shape[1], self.vocabulary), self.dtype)
        binding.bind_output(LOGITS, "cpu", 0, self.dtype, list(logits.shape), logits.ctypes.data)
        self.session.run_with_iobinding(binding)
        self._cache = list(binding.get_outputs())[: len(self._present)]
        return logits


def open_decoder(
    source: str | Path | onnxruntime.InferenceSession,
    capacity: int,
    *,
    threads: int = 0,
    batch: int = 1,
    weights: Mapping[str, onnxruntime.OrtValue] | None = None,
) -> DecoderSession:
    """A session for an exported decoder, whichever cache its graph has; see `DecoderSession`."""
    if isinstance(source, onnxruntime.InferenceSession):
        session = source
    else:
        check_capacity(source, capacity)
        session = open_session(source, threads)
    kind = GrowingSession if grows(session) else DecoderSession
    return kind(session, capacity, batch=batch, weights=weights)
