"""Cases of tests/architectures.py as torch models and as float64 models, and the one judged by the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from architectures import AUTO, CASES, make
from torch import nn

from loracle.export.tasks import TASKS
from loracle.export.verification.truth import Float64Model, Truth
from loracle.files import Adapter

FLOAT32 = np.dtype(np.float32)
TASK = {task.name: task for task in TASKS}
Feeds = dict[str, np.ndarray]


def checkpoints(root: Path) -> Callable[[str], Path]:
    """What makes the checkpoint of a case under `root`, once."""

    def checkpoint(name: str) -> Path:
        return root / name if (root / name).exists() else make(root / name, name)

    return checkpoint


def loaded(
    folder: Path, name: str, dtype: torch.dtype = torch.float32, implementation: str | None = None
) -> Any:
    auto = getattr(hf, AUTO[CASES[name].task])
    kinds = {"attn_implementation": implementation, "experts_implementation": implementation}
    return auto.from_pretrained(folder, dtype=dtype, **kinds).eval()


def truth_of(folder: Path, adapter: Adapter | None, name: str) -> Float64Model:
    return Float64Model(folder, adapter, TASK[CASES[name].task])


def outputs(model: nn.Module, inputs: Feeds, dtype: torch.dtype = torch.float32) -> dict[str, np.ndarray]:
    """What a torch model answers."""
    tensors = {key: torch.from_numpy(array) for key, array in inputs.items()}
    with torch.no_grad():
        answer = model(**{k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()})
    return {key: t.double().numpy() for key, t in answer.items() if isinstance(t, torch.Tensor)}


def error_of(got: dict[str, np.ndarray], truths: dict[str, Truth], inputs: Feeds, name: str) -> float:
    """The largest error over its tolerance where texts are not padded."""
    ratios = []
    for key, truth in truths.items():
        gap = np.abs(got[key] - truth.logits)
        if CASES[name].task not in ("image-classification", "text-classification", "text2text-generation"):
            gap = gap[inputs["attention_mask"] == 1]
        ratios.append(float(gap.max()) / truth.tolerance)
    return max(ratios)
