"""An exported decoder in onnxruntime: keys and values are appended in place, nothing is copied per step.

Needs onnxruntime and NumPy alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
import onnxruntime

from loracle.reference import ConfigError, FileError, ShapeError

from .names import ATTENTION_MASK, GRAPH_FILE, INPUT_IDS, LOGITS, past_names, present_names

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}


def open_session(folder: str | Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """An onnxruntime session over `folder/model.onnx`; CUDA where the installed onnxruntime has it.

    Raises FileError where the folder holds no model or onnxruntime refuses it.
    """
    path = Path(folder) / GRAPH_FILE
    if not path.is_file():
        raise FileError(f"{path}: expected an exported model, found none; make one with `loracle export`")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Every fully used core spins between operators otherwise, which slows whatever else runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads != 1 else "0")
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    available = onnxruntime.get_available_providers()
    try:
        return onnxruntime.InferenceSession(
            str(path), options, providers=[provider for provider in wanted if provider in available]
        )
    except onnxruntime.capi.onnxruntime_pybind11_state.OnnxRuntimeException as error:
        raise FileError(f"{path}: onnxruntime refuses it: {str(error).splitlines()[0]}") from error


class DecoderSession:
    """One sequence at a time through an exported decoder.

    The cache of each layer is one buffer (1, kv_heads, capacity, head_dim), bound both as `past` and as
    `present`: the attention operator appends to it in place.

    Args:
        source: folder of the exported model, or a session opened on it.
        capacity: most tokens, prompt and answer together.
        threads: onnxruntime's threads; 0 leaves the choice to it.
    """

    def __init__(
        self, source: str | Path | onnxruntime.InferenceSession, capacity: int, *, threads: int = 0
    ) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity: expected at least 1 token, got {capacity}")
        session = (
            source if isinstance(source, onnxruntime.InferenceSession) else open_session(source, threads)
        )
        inputs = {entry.name: entry for entry in session.get_inputs()}
        outputs = {entry.name: entry for entry in session.get_outputs()}
        layers = sum(name.endswith(".key") for name in inputs)
        missing = [
            name for name in (INPUT_IDS, ATTENTION_MASK, *past_names(layers)) if name not in inputs
        ] + [name for name in (LOGITS, *present_names(layers)) if name not in outputs]
        if missing or layers == 0:
            raise FileError(
                f"{missing[0] if missing else 'past_key_values.0.key'}: expected among the model's inputs "
                "and outputs, found none; is this a decoder with a key-value cache?"
            )
        first = inputs[past_names(layers)[0]]
        self.session = session
        self.capacity = capacity
        self.length = 0
        self.dtype = _DTYPES[first.type]
        self.vocabulary = int(outputs[LOGITS].shape[-1])
        self._device = "cuda" if "CUDAExecutionProvider" in session.get_providers() else "cpu"
        shape = (1, int(first.shape[1]), capacity, int(first.shape[3]))
        self._binding = session.io_binding()
        self._cache = []
        for past, present in zip(past_names(layers), present_names(layers), strict=True):
            buffer = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, self.dtype), self._device, 0)
            self._binding.bind_ortvalue_input(past, buffer)
            self._binding.bind_ortvalue_output(present, buffer)
            self._cache.append(buffer)
        self._mask = np.ones((1, capacity), np.int64)
        self._one = np.empty((1, 1, self.vocabulary), self.dtype)

    def reset(self) -> None:
        """Forget the sequence; the buffers stay."""
        self.length = 0

    def step(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Append tokens and return their logits.

        Args:
            ids: (n,) integers, the tokens that follow those already given.

        Returns:
            logits (n, vocabulary) in the model's dtype; the next call of one token may overwrite them.

        Raises:
            ShapeError: no token, or more than the capacity has room for.
        """
        count = int(ids.shape[0])
        end = self.length + count
        if count == 0 or end > self.capacity:
            raise ShapeError(
                f"input_ids: expected 1 to {self.capacity - self.length} more tokens, got {count}; "
                "open the session with a larger capacity"
            )
        binding = self._binding
        tokens = np.ascontiguousarray(ids, np.int64)[None]
        binding.bind_cpu_input(INPUT_IDS, tokens)
        binding.bind_cpu_input(ATTENTION_MASK, np.ascontiguousarray(self._mask[:, :end]))
        logits = self._one if count == 1 else np.empty((1, count, self.vocabulary), self.dtype)
        # NumPy owns the buffer: an array taken from an OrtValue would not keep its memory alive.
        binding.bind_output(LOGITS, "cpu", 0, self.dtype, list(logits.shape), logits.ctypes.data)
        self.session.run_with_iobinding(binding)
        self.length = end
        result: np.ndarray[Any, Any] = logits[0]
        return result
