"""From a base model and an adapter to ONNX: loracle against PEFT + Optimum and PEFT + onnxruntime-genai.

Every step is a fresh process; the ways run in turn, `--rounds` times; median seconds and largest peak count.
The results are compared too: the logits after a prompt, run through onnxruntime.

    python -m benchmarks.export --optimum PYTHON [--rounds 3] [--out benchmarks/results/export.json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

from loracle.demo.smollm2 import model_folder

from .adapters import random_adapter
from .machine import describe
from .process import Measured, measure

PROMPT = (504, 3575, 282, 4649, 314)

_PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""


def _ways(optimum: str, base: Path, adapter: Path, work: Path) -> dict[str, tuple[Path, list[list[str]]]]:
    """Name -> (folder with model.onnx, the commands that make it)."""
    merged = str(work / "merged")

    def merge(python: str) -> list[str]:
        return [python, "-c", _PEFT_MERGE, str(base), str(adapter), merged]

    ours = [sys.executable, "-m", "loracle.cli", "export", "--model", str(base), "--adapter", str(adapter)]
    builder = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-m",
        merged,
        "-p",
        "fp32",
        "-e",
        "cpu",
    ]
    exporter = [optimum, "-m", "optimum.commands.optimum_cli", "export", "onnx", "--model", merged]
    exporter += ["--task", "text-generation-with-past", "--no-post-process"]
    return {
        "loracle, graph cached": (work / "loracle", [[*ours, "--out", str(work / "loracle")]]),
        "loracle, first export": (work / "first", [[*ours, "--out", str(work / "first")]]),
        "PEFT + genai builder": (
            work / "genai",
            [
                merge(sys.executable),
                [*builder, "-o", str(work / "genai"), "-c", str(work / "genai-cache")],
            ],
        ),
        "PEFT + Optimum": (work / "optimum", [merge(optimum), [*exporter, str(work / "optimum")]]),
    }


def last_logits(
    folder: Path, base: Path, ids: Sequence[int]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The logits (vocabulary,) after `ids`, from an empty cache of `base`'s shape."""
    config = json.loads((base / "config.json").read_text())
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    tokens = np.array([ids], np.int64)
    feeds = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
    }
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values"):
            feeds[entry.name] = np.zeros(
                (1, config["num_key_value_heads"], 0, config["head_dim"]), np.float32
            )
    wanted = {entry.name for entry in session.get_inputs()}
    logits = session.run(["logits"], {name: feed for name, feed in feeds.items() if name in wanted})[0]
    result: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = logits[0, -1]
    return result


def _compatible(base: Path, out: Path) -> Path:
    """A copy of `base` for older transformers: rope_theta at the top, a tokenizer class they know."""
    shutil.copytree(base, out)
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (out / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimum", required=True, help="Python with the packages of benchmarks/peers.txt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/export.json"))
    arguments = parser.parse_args()
    runs: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        base = _compatible(model_folder(), work / "base")
        adapter = random_adapter(base, work / "adapter")
        environment = {
            "LORACLE_CACHE": str(work / "cache"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        ways = _ways(arguments.optimum, base, adapter, work)
        measure(ways["loracle, graph cached"][1][0], environment)  # fills the cache, and is not counted
        parity: dict[str, float] = {}
        expected = None
        for _ in range(arguments.rounds):
            for name, (folder, commands) in ways.items():
                for leftover in (folder, work / "merged"):
                    shutil.rmtree(leftover, ignore_errors=True)
                first = {"LORACLE_CACHE": str(folder) + "-cache"} if name.endswith("first export") else {}
                shutil.rmtree(str(folder) + "-cache", ignore_errors=True)
                steps = [measure(command, {**environment, **first}) for command in commands]
                runs.setdefault(name, []).append(
                    Measured(sum(s.seconds for s in steps), max(s.peak_bytes for s in steps))
                )
                if name not in parity:
                    logits = last_logits(folder, base, PROMPT)
                    expected = logits if expected is None else expected
                    parity[name] = float(np.abs(logits - expected).max())
                    if int(logits.argmax()) != int(expected.argmax()):
                        raise SystemExit(
                            f"{name}: its most likely token differs, so there is nothing to compare"
                        )
    result = {
        "machine": describe("torch", "transformers", "onnxruntime", "onnx-ir", "onnxscript"),
        "model": "SmolLM2-135M-Instruct, float32, all linear layers adapted, r=8",
        "rounds": arguments.rounds,
        "ways": {
            name: {
                "seconds": statistics.median(run.seconds for run in measured),
                "all_seconds": [round(run.seconds, 2) for run in measured],
                "peak_gb": max(run.peak_bytes for run in measured) / 1e9,
                "largest_logit_difference": parity[name],
            }
            for name, measured in runs.items()
        },
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("way", "seconds", "peak GB", "logits differ by", title="merge and export, 135M, fp32")
    for name, row in result["ways"].items():
        table.add_row(
            name, f"{row['seconds']:.1f}", f"{row['peak_gb']:.2f}", f"{row['largest_logit_difference']:.1e}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
