"""Where onnxruntime computes each node of a decoder's step, read from its own profile."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import onnxruntime

from loracle.export import DecoderSession
from loracle.export.names import GRAPH_FILE
from loracle.export.providers import providers_of

Nodes = dict[str, dict[str, int]]
"""For each provider how many nodes of each operator."""


def nodes_of_a_step(folder: Path, device: str, work: Path) -> Nodes:
    """Decode a token behind a prompt of four, and count the nodes that ran for it.

    Args:
        folder: an exported decoder.
        device: that the session runs on.
        work: where the profile is written.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(work / "profile")
    session = onnxruntime.InferenceSession(str(folder / GRAPH_FILE), options, providers=providers_of(device))
    decoder = DecoderSession(session, 8)
    decoder.prefill([[1, 2, 3, 4]])
    decoder.decode([5])
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = [event for event in events if event["name"] == "model_run"]
    step = max(runs, key=lambda event: event["ts"])
    found: dict[str, Counter[str]] = {}
    for event in events:
        within = step["ts"] <= event["ts"] <= step["ts"] + step["dur"]
        if within and event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            of = event["args"]
            found.setdefault(of["provider"], Counter())[of["op_name"]] += 1
    return {provider: dict(sorted(counts.items())) for provider, counts in found.items()}
