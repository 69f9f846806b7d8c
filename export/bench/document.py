"""The result file of `loracle bench`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from loracle.files.machine import machine_document

from .models import BenchModel
from .report import findings
from .settings import Effort

KIND, VERSION = "loracle bench", 1
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnx-ir", "torch", "transformers", "numpy")


def document_of(
    model: BenchModel,
    provider: str,
    dtype: str,
    effort: Effort,
    rows: Sequence[Mapping[str, Any]],
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    """What is written: the machine, what was asked for, `report.row_of`'s rows and `report.findings`.

    Args:
        left_out: methods that the model has no place for, and why.
    """
    return {
        "kind": KIND,
        "version": VERSION,
        "machine": machine_document(_PACKAGES),
        "model": {
            "name": model.name,
            "layers": model.layers,
            "full_layers": model.full_layers,
            "full_parameters": model.full_parameters,
            "random_weights": model.random,
        },
        "provider": provider,
        "dtype": dtype,
        "effort": asdict(effort),
        "rows": list(rows),
        "findings": findings(rows),
        "left_out": dict(left_out),
    }


def document_bytes(document: Mapping[str, Any]) -> bytes:
    """The document as a file."""
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()
