"""What a candidate is held against, and what was found of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracle.files import Adapter, Checkpoint, MergedWeights

from ..write import Progress
from .digests import Digests, InputFiles
from .graph_summary import GraphSummary
from .memory import available_memory
from .outputs_check import OutputsResult
from .report import Check
from .verdict import WeightVerdict

_FLOAT64_BYTES = 9
"""Of a parameter of the model in float64, with what loading takes besides."""

DATA_ROWS = 16
"""How many examples of data are read, unless more are asked for."""

NO_OUTPUTS = OutputsResult((), None, None)


@dataclass(frozen=True)
class Asked:
    """What a candidate is held against, and how; see `verify`.

    Attributes:
        weights: the base with the adapter merged in.
        digests: takes the files of the candidate; None where none are digested.
    """

    model_dir: Path
    adapter_dir: Path | None
    adapter: Adapter | None
    checkpoint: Checkpoint
    weights: MergedWeights
    prompts: Sequence[str] | None
    new_tokens: int
    exact: bool | None
    outputs: bool | None
    base_graph: Path | None
    trusted: bool
    digests: Digests | None
    progress: Progress | None

    def digest(self, files: InputFiles) -> None:
        """Digest files in the background, where that is wanted."""
        if self.digests is not None:
            self.digests.add(files)

    def outputs_left_out(self) -> Check | None:
        """Why outputs are not compared; None where they are."""
        if self.outputs:
            return None
        name = "outputs are the unmerged model's"
        if self.outputs is False:
            return Check(name, True, "not compared: left out by choice", asked=False)
        needed, available = self.checkpoint.total_parameters * _FLOAT64_BYTES, available_memory()
        if available is None or needed <= available:
            return None
        figure = (
            f"not compared: the model takes {needed / 2**30:.1f} GiB in float64, "
            f"{available / 2**30:.1f} GiB are free"
        )
        return Check(name, True, figure, asked=False)


@dataclass(frozen=True)
class Found:
    """What was found of a candidate; see `VerifyReport`.

    Attributes:
        file: of the graph that was verified, or the folder of the checkpoint; None for several graphs.
        model: the graph's content.
        rounded_to: the dtype that its weights were merged in, where that is coarser than the graph's.
    """

    checks: tuple[Check, ...]
    weights: tuple[WeightVerdict, ...]
    outputs: OutputsResult = NO_OUTPUTS
    sha256: str | None = None
    graph: GraphSummary | None = None
    file: Path | None = None
    model: ir.Model | None = None
    rounded_to: np.dtype[Any] | None = None
