"""Where onnxruntime runs a graph, and what it is told for it."""

from __future__ import annotations

from collections.abc import Mapping

import onnxruntime

CPU, CUDA = "cpu", "cuda"
PROVIDERS: Mapping[str, str] = {CPU: "CPUExecutionProvider", CUDA: "CUDAExecutionProvider"}
"""onnxruntime's names of what runs on a device, by its names of the devices."""

# Products of float32 numbers would be those of 11 bits otherwise, which no bound of float32 covers.
_OPTIONS: Mapping[str, dict[str, str]] = {CPU: {}, CUDA: {"use_tf32": "0"}}


def providers_of(device: str) -> list[tuple[str, dict[str, str]]]:
    """The `providers` of a session that runs on a device, and on the CPU what cannot run there."""
    return [(PROVIDERS[own], _OPTIONS[own]) for own in dict.fromkeys((device, CPU))]


def best_device() -> str:
    """CUDA where the installed onnxruntime has it."""
    return CUDA if PROVIDERS[CUDA] in onnxruntime.get_available_providers() else CPU


def device_of(session: onnxruntime.InferenceSession) -> str:
    """Where a session runs."""
    return CUDA if PROVIDERS[CUDA] in session.get_providers() else CPU
