"""Anybody's exported model in onnxruntime: called by what its inputs are for, whatever they are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from loracle.reference import FileError

from ..opening import REFUSALS
from .foreign_inputs import Interface, Role

Array = np.ndarray[Any, Any]


class ForeignSession:
    """A graph by any exporter.

    Args:
        session: on the graph, or on one that has more outputs.
        interface: how the graph is called.
    """

    def __init__(self, session: onnxruntime.InferenceSession, interface: Interface) -> None:
        self._session = session
        self.interface = interface

    def has(self, role: Role) -> bool:
        """Whether the graph has an input of this role."""
        return role in self.interface.inputs

    def run_texts(
        self,
        tokens: Array,
        mask: Array,
        *,
        segments: Array | None = None,
        cache: Sequence[Array] = (),
        more: Sequence[str] = (),
    ) -> list[Array]:
        """Run texts.

        Args:
            tokens: (rows, n) integers that follow what is cached.
            mask: (rows, cached + n), 1 for a token and 0 for padding.
            segments: (rows, n), the number of the segment that each token is in; None for 0.
            cache: in the order of the interface's, each row with as many tokens.
            more: names of further outputs.

        Returns:
            the outputs asked for, then the cache with the new tokens, then `more`.

        Raises FileError: onnxruntime cannot run it.
        """
        count = tokens.shape[1]
        past = mask.shape[1] - count
        given = {
            Role.TOKENS: tokens,
            Role.MASK: mask,
            Role.POSITIONS: np.broadcast_to(np.arange(past, past + count), tokens.shape),
            Role.SEGMENTS: np.zeros(tokens.shape, np.int64) if segments is None else segments,
            Role.KEPT_LOGITS: np.array(0),
            Role.PAST_LENGTH: np.array(past),
            Role.TOTAL_LENGTH: np.array(past + count),
            Role.HAS_PAST: np.array(past > 0),
            Role.CACHE_POSITIONS: np.arange(past, past + count),
        }
        feeds = {}
        for role, entry in self.interface.inputs.items():
            value = given[role]
            if role is Role.POSITIONS and len(entry.axes) == 1:
                value = value[0]
            elif value.ndim == 0 and len(entry.axes) == 1:
                length = entry.axes[0]
                value = np.full(length if isinstance(length, int) else 1, value)
            feeds[entry.name] = np.array(value, entry.dtype, order="C")
        empty = [np.zeros(place.empty, place.past.dtype) for place in self.interface.cache]
        for place, held in zip(self.interface.cache, cache or empty, strict=True):
            feeds[place.past.name] = held
        return self._run(feeds, [place.present for place in self.interface.cache], more)

    def run_images(self, pixels: Array, more: Sequence[str] = ()) -> list[Array]:
        """Run images (rows, channels, height, width); see `run_texts`."""
        entry = self.interface.inputs[Role.PIXELS]
        return self._run({entry.name: pixels.astype(entry.dtype)}, [], more)

    def _run(self, feeds: Mapping[str, Array], presents: Sequence[str], more: Sequence[str]) -> list[Array]:
        try:
            found: list[Array] = self._session.run([*self.interface.outputs, *presents, *more], feeds)
        except REFUSALS as error:
            raise FileError(
                f"{self.interface.graph}: onnxruntime cannot run it: {str(error).splitlines()[0]}"
            ) from error
        return found


class ForeignDecoder:
    """One text read by a decoder, with a cache or without one.

    Args:
        session: on its graph.

    Raises FileError: the graph takes a fixed number of tokens beside a cache.
    """

    def __init__(self, session: ForeignSession) -> None:
        interface = session.interface
        if interface.cache and interface.width not in (None, 1):
            raise FileError(
                f"{interface.graph}: expected any number of tokens beside a cache, found {interface.width}; "
                "export the model with a dynamic length"
            )
        self._session = session
        self._width = interface.width
        self._rows = interface.rows or 1
        self.reset()

    @property
    def longest(self) -> int | None:
        """Most tokens that the graph can read; None for any number."""
        return None if self._session.interface.cache else self._width

    def reset(self) -> None:
        """Forget the text."""
        self._ids = np.zeros(0, np.int64)
        self._cache: list[Array] = []

    def step(self, ids: Array) -> Array:
        """Append tokens, and return logits (n, vocabulary) after each; or (1, vocabulary) after the last,
        where the graph gives no others.

        Raises FileError: the graph answers with another number of logits.
        """
        if not self._session.interface.cache:
            return self._whole(ids)
        if self._width == 1:
            return np.concatenate([self._cached(ids[place : place + 1]) for place in range(len(ids))])
        return self._cached(ids)

    def logits(self, ids: Array) -> Array:
        """The logits (n, vocabulary) after each token of a text, which is forgotten again.

        Raises FileError: the graph answers with another number of logits.
        """
        self.reset()
        found = self.step(ids)
        if len(found) != len(ids):
            self.reset()
            found = np.concatenate([self.step(ids[place : place + 1]) for place in range(len(ids))])
        self.reset()
        return found

    def _cached(self, ids: Array) -> Array:
        self._ids = np.concatenate([self._ids, ids])
        answer = self._run(ids, len(self._ids), self._cache)
        self._cache = answer[1:]
        return self._rows_of(answer[0], len(ids), len(ids))

    def _whole(self, ids: Array) -> Array:
        self._ids = np.concatenate([self._ids, ids])
        length = len(self._ids)
        padded = self._ids
        if self._width is not None:
            # What stands behind a text changes nothing before it.
            padded = np.pad(self._ids, (0, self._width - length))
        answer = self._run(padded, length, [])
        return self._rows_of(answer[0], len(padded), length)[-len(ids) :]

    def _run(self, ids: Array, length: int, cache: Sequence[Array]) -> list[Array]:
        """Run tokens, of which `length` with the cached ones are no padding."""
        past = len(self._ids) - len(ids) if self._session.interface.cache else 0
        mask = (np.arange(past + len(ids)) < length).astype(np.int64)
        repeated = [np.tile(array, (self._rows, 1)) for array in (ids, mask)]
        return self._session.run_texts(repeated[0], repeated[1], cache=cache)

    def _rows_of(self, logits: Array, given: int, length: int) -> Array:
        """The logits of the first `length` positions, or of the last alone."""
        own = logits[0] if logits.ndim == 3 else logits[:1]
        if len(own) == given:
            return own[:length]
        if len(own) == 1 and length == given:
            return own
        interface = self._session.interface
        raise FileError(
            f"{interface.graph}: {interface.outputs[0]}: expected logits after each of {given} tokens, or "
            f"after the last, got shape {logits.shape}"
        )
