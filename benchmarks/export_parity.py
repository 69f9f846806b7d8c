"""Are the graphs that `benchmarks.export` compares the same model? Their logits after a prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from loracle.export.names import GRAPH_FILE, LOGITS
from loracle.files import read_adapter

PROMPT = (504, 3, 282, 49, 314)
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Judge:
    """The logits (vocabulary,) that a graph must give after `PROMPT`, and how far it may be off; None where
    that is not known."""

    logits: Array
    tolerance: float | None

    def error(self, name: str, logits: Array) -> float:
        """The largest difference of a way's logits.

        Raises SystemExit where it is above the tolerance, or, without one, where another token is the most
        likely.
        """
        error = float(np.abs(logits - self.logits).max())
        if self.tolerance is None:
            if int(logits.argmax()) != int(self.logits.argmax()):
                raise SystemExit(f"{name}: its most likely token is another: nothing to compare")
        elif not error <= self.tolerance:
            raise SystemExit(
                f"{name}: its logits are off by {error:.2g}, rounding explains {self.tolerance:.2g}: "
                "nothing to compare"
            )
        return error


def float64_judge(base: Path, adapter: Path, dtype: np.dtype[Any]) -> Judge:
    """The unmerged model in float64, and the tolerance of numerics, clause 7, for `dtype`."""
    from loracle.export.verification.truth import Float64Model

    (truth,) = Float64Model(base, read_adapter(adapter)).evaluate([PROMPT], dtype)
    return Judge(truth.logits[-1], truth.tolerance)


def last_logits(folder: Path, base: Path) -> Array:
    """The logits (vocabulary,) of an exported folder after `PROMPT`, from an empty cache; sizes: `base`."""
    config = json.loads((base / "config.json").read_text())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(folder / GRAPH_FILE), options, providers=["CPUExecutionProvider"]
    )
    tokens = np.array([PROMPT], np.int64)
    feeds = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.arange(len(PROMPT), dtype=np.int64)[None],
    }
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    wanted = {entry.name: entry for entry in session.get_inputs()}
    for name, entry in wanted.items():
        if name.startswith("past_key_values"):
            shape = (1, config["num_key_value_heads"], 0, config["head_dim"])
            feeds[name] = np.zeros(shape, types[entry.type])
    logits = session.run([LOGITS], {name: feed for name, feed in feeds.items() if name in wanted})[0]
    result: Array = logits[0, -1].astype(np.float64)
    return result
