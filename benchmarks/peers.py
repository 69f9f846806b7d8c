"""The peers' programs from a merged checkpoint to ONNX, and what the older packages among them need."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from loracle.export.names import GRAPH_FILE

PEERS_PYTHON = Path(".venv-peers/bin/python")
"""Has the packages of benchmarks/peers.txt; `make .venv-peers/stamp` makes it."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def check_python(python: Path) -> None:
    """Raise SystemExit where the packages of peers.txt are not there."""
    if not python.is_file():
        raise SystemExit(
            f"{python}: expected a Python with the packages of benchmarks/peers.txt, found none; "
            "run `make .venv-peers/stamp`, or leave the ways with Optimum out"
        )


def peft_merge(python: str, base: Path, adapter: Path, out: Path, dtype: str) -> list[str]:
    """The command that merges with PEFT in `dtype` and saves a checkpoint."""
    return [python, "-m", "benchmarks.peft_merge", str(base), str(adapter), str(out), dtype]


def genai_builder(checkpoint: Path, out: Path, cache: Path, precision: str) -> list[str]:
    """The command of onnxruntime-genai's builder, for the CPU in "fp32" or "fp16"."""
    program = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(checkpoint), "-e", "cpu"]
    return [*program, "-p", precision, "-o", str(out), "-c", str(cache)]


def optimum_exporter(python: Path, checkpoint: Path, out: Path) -> list[str]:
    """The command of Optimum's exporter; its validation of the result is a part of it."""
    program = [str(python), "-m", "optimum.commands.optimum_cli", "export", "onnx"]
    options = ["--task", "text-generation-with-past", "--no-post-process"]
    return [*program, "--model", str(checkpoint), *options, str(out)]


def torch_exporter(base: Path, adapter: Path, out: Path, dtype: str) -> list[str]:
    """The command that merges with PEFT and exports with torch, in one process."""
    return [
        sys.executable,
        "-m",
        "benchmarks.torch_export",
        str(base),
        str(adapter),
        str(out / GRAPH_FILE),
        dtype,
    ]


def compatible(model: Path, out: Path) -> Path:
    """A copy of a folder for older transformers: rope_theta at the top, a tokenizer class they know."""
    shutil.copytree(model, out)
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (out / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2))
    return out
