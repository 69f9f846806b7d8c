"""What a checkpoint's tensors are beside the exact merge, computed entry by entry in rational arithmetic."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.export.verification.report import VerifyReport
from loracle.export.verification.verdict import Verdict
from loracle.files import Checkpoint, read_adapter
from loracle.reference import merge_exact, round_to

from .subjects import Subject

RIGHT = (Verdict.EXACT, Verdict.UNTOUCHED)


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))


@cache
def _exact(base: Path, adapter: Path, path: str, dtype: str) -> NDArray[Any]:
    """A merged weight as it should be, in the checkpoint's orientation."""
    pair = read_adapter(adapter).pairs[path]
    with Checkpoint(base) as checkpoint:
        W0 = np.array(checkpoint.tensor(f"{path}.weight"))
    turned = W0.shape != (len(pair.B), pair.A.shape[1]) or read_adapter(adapter).config.fan_in_fan_out
    merged = merge_exact(W0.T if turned else W0, pair.A, pair.B, pair.scaling, dtype)
    return merged.T if turned else merged


def disagreements(report: VerifyReport, candidate: Path, subject: Subject) -> list[str]:
    """Weights of a checkpoint of which a report says that they are right, though some bits are not those of
    the exact sum rounded once, or the other way round; or with another number of wrong entries."""
    adapter = read_adapter(subject.adapter)
    pairs = {f"{path}.weight": path for path in adapter.pairs}
    found = []
    with Checkpoint(subject.base) as base, Checkpoint(candidate) as checkpoint:
        for weight in report.weights:
            if weight.name not in checkpoint.names or weight.name not in base.names:
                continue
            got = checkpoint.tensor(weight.name)
            if got.shape != base.shape(weight.name):
                continue
            if weight.name in pairs:
                want = _exact(subject.base, subject.adapter, pairs[weight.name], str(got.dtype))
            else:
                own = adapter.tensors.get(weight.name)
                want = round_to(np.array(base.tensor(weight.name)) if own is None else own, got.dtype)
            unequal = int(np.count_nonzero(_bits(got) != _bits(want)))
            if unequal != weight.unequal or (unequal == 0) != (weight.verdict in RIGHT):
                found.append(f"{unequal} entries differ, but: {weight}")
    return found
