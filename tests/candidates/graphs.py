"""ONNX models that others make. Each function: (checkpoint, folder to make) -> that folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.peers import OFFLINE, PEERS_PYTHON, compatible, genai_builder, optimum_exporter
from loracle.export import export
from loracle.export.names import GRAPH_FILE

Export = Callable[..., Path]

ROOT = Path(__file__).parents[2]


def run(command: Sequence[str]) -> None:
    """Run a program. Raises RuntimeError with what it has printed where it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **OFFLINE}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def by_loracle(checkpoint: Path, out: Path, *, adapter: Path | None = None, dtype: str = "fp32") -> Path:
    """`loracle export`."""
    export(checkpoint, out, adapter, dtype=dtype)
    return out


def by_genai(checkpoint: Path, out: Path, *, adapter: Path | None = None, precision: str = "fp32") -> Path:
    """onnxruntime-genai's builder; with `adapter` it is told of one by `adapter_path`."""
    command = genai_builder(checkpoint, out, out.with_name(f"{out.name} cache"), precision)
    if adapter is not None:
        command += ["--extra_options", f"adapter_path={adapter}"]
    run(command)
    return out


def by_torch(checkpoint: Path, out: Path) -> Path:
    """`torch.onnx.export(dynamo=True)` of the model without a cache."""
    out.mkdir()
    run(
        [
            sys.executable,
            str(Path(__file__).with_name("torch_onnx.py")),
            str(checkpoint),
            str(out / GRAPH_FILE),
        ]
    )
    return out


def by_optimum(checkpoint: Path, out: Path) -> Path:
    """Optimum's exporter, in an environment of its own with an older transformers."""
    config = json.loads((checkpoint / "config.json").read_text())
    python = ROOT / PEERS_PYTHON
    if config["model_type"] == "llama":
        run(optimum_exporter(python, compatible(checkpoint, out.with_name(f"{out.name} compatible")), out))
        return out
    task = "text-generation-with-past" if config["model_type"] == "gpt2" else "text-classification"
    program = [str(python), "-m", "optimum.commands.optimum_cli", "export", "onnx", "--no-post-process"]
    run([*program, "--task", task, "--model", str(checkpoint), str(out)])
    return out
