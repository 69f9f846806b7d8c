"""The device that a result file belongs to, and the file."""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from loracle.files import write_atomic

from .machine import describe

PACKAGES = ("torch", "transformers", "peft", "triton", "onnxruntime", "onnxruntime-gpu", "liger-kernel")


def require_cuda(device: str) -> None:
    """Raise SystemExit where the device is CUDA and there is none."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device, found none; run this on a machine that has one")


def describe_device(device: str) -> dict[str, Any]:
    """Processor and package versions; of CUDA name, memory, multiprocessors, driver and the library's."""
    found = describe(*PACKAGES)
    if torch.device(device).type != "cuda":
        return found
    own = torch.cuda.get_device_properties(device)
    return {
        **found,
        "device": own.name,
        "device_bytes": own.total_memory,
        "multiprocessors": own.multi_processor_count,
        "compute_capability": f"{own.major}.{own.minor}",
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def write_result(out: Path | None, result: dict[str, Any]) -> None:
    """Write a result file, where one is wanted."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, (json.dumps(result, indent=2) + "\n").encode())


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(package) is not None


def _driver() -> str | None:
    """The driver's version, where nvidia-smi tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0] if lines else None
