"""A graph in onnxruntime, ready to be run again and again on one input, all that it reads and writes bound.

A prefill is one forward pass with the logits of every position, as in the paper's Table 1. A step of decoding
is one token a row behind a full cache; it is the same step every time, so that onnxruntime plans its memory
once.

Behind a past, the attention operator takes several new tokens of one row alone: a batch with a prefix is
prefilled row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime

from loracle.reference import ConfigError, FileError

from ..names import ATTENTION_MASK, INPUT_IDS, LOGITS, PAST, TOKEN_TYPE_IDS, past_names, present_names
from ..opening import DTYPES, REFUSALS, grows
from ..providers import PROVIDERS, providers_of
from .graphs import MethodGraph
from .settings import DECODE, PREFILL, Setting

Array = np.ndarray[Any, Any]
Call = Callable[[], None]

_FIRST_TOKEN = 3
_SPREAD = 0.1


def check_provider(provider: str) -> None:
    """Raise ConfigError unless the installed onnxruntime has a provider."""
    if provider not in PROVIDERS:
        raise ConfigError(f"provider: expected one of {', '.join(PROVIDERS)}, got {provider!r}")
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise ConfigError(
            f"provider: expected an onnxruntime with {PROVIDERS[provider]}, got one with "
            f"{', '.join(onnxruntime.get_available_providers())}; pip install 'loracle[gpu]'"
        )


def open_method(graph: MethodGraph, provider: str, threads: int) -> onnxruntime.InferenceSession:
    """A session over a method's graph.

    Its threads stop waiting for work when a run ends: they would slow the session that is measured next.

    Raises FileError where onnxruntime refuses the graph; ConfigError where it does not use the provider.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(str(graph.graph), options, providers=providers_of(provider))
    except REFUSALS as error:
        reason = str(error).splitlines()[0]
        raise FileError(f"{graph.graph.name}: onnxruntime refuses it: {reason}") from error
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise ConfigError(f"provider: expected {PROVIDERS[provider]}, got {session.get_providers()[0]}")
    return session


class Runner:
    """What a method does in one setting.

    Args:
        graph: of the method.
        session: opened over it.
        setting: batch and length.
        vocabulary: of the model.
        provider: that the session has.
        held: buffers that runners share which do not run at the same time, by their names and shapes.
        seed: of the texts, which are the same for every method.
    """

    def __init__(
        self,
        graph: MethodGraph,
        session: onnxruntime.InferenceSession,
        setting: Setting,
        vocabulary: int,
        provider: str,
        held: dict[tuple[object, ...], onnxruntime.OrtValue] | None = None,
        seed: int = 0,
    ) -> None:
        self._held = {} if held is None else held
        # A binding does not keep the memory of what is bound alive.
        self._kept: list[onnxruntime.OrtValue] = []
        self._session, self._provider = session, provider
        self._names = [entry.name for entry in session.get_inputs()]
        self._outputs = {entry.name: entry for entry in session.get_outputs()}
        first = next(iter(self._outputs.values()))
        self._dtype = DTYPES[first.type]
        self._extra = {name: self._value(array) for name, array in graph.inputs.items()}
        rng = np.random.default_rng(seed)
        tokens = rng.integers(min(_FIRST_TOKEN, vocabulary - 1), vocabulary, (setting.batch, setting.length))
        virtual = np.arange(vocabulary, vocabulary + graph.prompt)
        self.tokens = np.concatenate([np.tile(virtual, (setting.batch, 1)), tokens], 1)
        self._past, self._row_by_row = graph.past, graph.row_by_row
        self._layers = sum(name.startswith(PAST) and name.endswith(".key") for name in self._names)
        self._prefix = self._random_prefix() if self._layers else []

    @property
    def phases(self) -> tuple[str, ...]:
        """What the graph can do."""
        return (PREFILL, DECODE) if self._layers else (PREFILL,)

    def call(self, phase: str) -> Call:
        """A call that runs a phase once, and returns when its results are there."""
        if phase == PREFILL:
            bindings = self._prefills()
        else:
            bindings = [self._decoder(self.tokens[:, -1:], self._past + self.tokens.shape[1])]

        def run() -> None:
            for binding in bindings:
                self._session.run_with_iobinding(binding)
                binding.synchronize_outputs()

        return run

    def prefill(self) -> Mapping[str, Array]:
        """The outputs of one prefill, but for the cache, by their names."""
        found: dict[str, list[Array]] = {}
        for binding in self._prefills():
            self._session.run_with_iobinding(binding)
            for name, value in zip(self._outputs, binding.get_outputs(), strict=False):
                if not name.startswith("present."):
                    found.setdefault(name, []).append(value.numpy().copy())
        return {name: np.concatenate(arrays) for name, arrays in found.items()}

    def buffer(self, name: str, shape: tuple[int, ...]) -> Array:
        """What a bound output of this name and shape holds."""
        array: Array = self._buffer(name, shape).numpy()
        return array

    def prefix(self) -> list[Array]:
        """Key and value of each layer, alternating, (1, heads, positions, head size); the prefix."""
        return self._prefix

    def _prefills(self) -> list[onnxruntime.IOBinding]:
        """What a prefill runs, one after the other."""
        if not self._layers:
            return [self._encoder()]
        rows = np.split(self.tokens, len(self.tokens)) if self._row_by_row else [self.tokens]
        return [self._decoder(tokens, self._past) for tokens in rows]

    def _encoder(self) -> onnxruntime.IOBinding:
        binding = self._binding()
        values = {
            INPUT_IDS: self.tokens,
            ATTENTION_MASK: np.ones_like(self.tokens),
            TOKEN_TYPE_IDS: np.zeros_like(self.tokens),
        }
        for name, array in values.items():
            if name in self._names:
                binding.bind_ortvalue_input(name, self._value(array))
        for name in self._outputs:
            binding.bind_output(name, self._provider)
        return binding

    def _decoder(self, ids: Array, before: int) -> onnxruntime.IOBinding:
        """Bind new tokens behind `before` cached ones."""
        batch, count = ids.shape
        binding = self._binding()
        binding.bind_ortvalue_input(INPUT_IDS, self._value(ids))
        binding.bind_ortvalue_input(ATTENTION_MASK, self._value(np.ones((batch, before + count), np.int64)))
        vocabulary = int(self._outputs[LOGITS].shape[-1])
        logits = self._buffer(LOGITS, (batch, count, vocabulary))
        binding.bind_ortvalue_output(LOGITS, logits)
        names = zip(past_names(self._layers), present_names(self._layers), strict=True)
        growing = grows(self._session)
        for number, (past, present) in enumerate(names):
            room = before if growing else self._past + self.tokens.shape[1] + 1
            cache = self._cache(past, number, batch, room)
            binding.bind_ortvalue_input(past, cache)
            if growing:
                binding.bind_output(present, self._provider)
            else:
                binding.bind_ortvalue_output(present, cache)
        return binding

    def _cache(self, name: str, number: int, batch: int, room: int) -> onnxruntime.OrtValue:
        """Keys or values of a layer, the prefix first."""
        prefix = self._prefix[number]
        _, heads, _, size = prefix.shape
        if not self._past:
            return self._buffer(name, (batch, heads, room, size))
        cache = np.zeros((batch, heads, room, size), prefix.dtype)
        cache[:, :, : self._past] = prefix
        return self._value(cache)

    def _random_prefix(self) -> list[Array]:
        """Keys and values of the prefix, the same in every row."""
        shapes = {entry.name: entry.shape for entry in self._session.get_inputs()}
        rng = np.random.default_rng(1)
        prefix = []
        for name in past_names(self._layers):
            _, heads, _, size = shapes[name]
            one = rng.standard_normal((1, heads, self._past, size), dtype=np.float32)
            prefix.append((one * np.float32(_SPREAD)).astype(self._dtype))
        return prefix

    def _binding(self) -> onnxruntime.IOBinding:
        binding = self._session.io_binding()
        for name, value in self._extra.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def _buffer(self, name: str, shape: tuple[int, ...]) -> onnxruntime.OrtValue:
        """A buffer on the device, one for each name and shape."""
        key = (name, *shape)
        if key not in self._held:
            self._held[key] = self._value(np.zeros(shape, self._dtype))
        return self._held[key]

    def _value(self, array: Array) -> onnxruntime.OrtValue:
        value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._provider, 0)
        self._kept.append(value)
        return value
