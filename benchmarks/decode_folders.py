"""The model folders that `benchmarks.decode` runs, each made by the program whose way it is."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from loracle.export import export
from loracle.export.unmerged import export_unmerged
from loracle.files import Checkpoint, write_merged_checkpoint

from .adapters import random_adapter
from .decode_ways import BASE, GENAI, OPTIMUM, OURS, UNMERGED
from .peers import OFFLINE, compatible, genai_builder, optimum_exporter
from .process import measure

TEXT = Path("LICENSE")


@dataclass(frozen=True)
class Folders:
    """Where the models are.

    Attributes:
        base, adapter: what all are made from.
        checkpoint: the merged weights in the layout of `base`.
        graphs: the exported folders of some of `decode_ways.WAYS`, and of `OURS`.
        weight_bytes: what a token reads at least.
    """

    base: Path
    adapter: Path
    checkpoint: Path
    graphs: dict[str, Path]
    weight_bytes: int


def make_folders(base: Path, work: Path, wanted: Collection[str], peers: Path) -> Folders:
    """Make in `work` what the `wanted` ways run, in float32.

    Args:
        base: a folder of transformers, of Llama's architecture, in float32.
        peers: the Python that has Optimum.
    """
    adapter = random_adapter(base, work / "adapter")
    checkpoint = work / "checkpoint"
    write_merged_checkpoint(base, adapter, checkpoint)
    graphs = {OURS: work / "merged"}
    export(base, graphs[OURS], adapter)
    if BASE in wanted:
        graphs[BASE] = work / "base"
        export(base, graphs[BASE])
    if UNMERGED in wanted:
        graphs[UNMERGED] = work / "unmerged"
        export_unmerged(base, adapter, graphs[UNMERGED])
    if GENAI in wanted:
        graphs[GENAI] = work / "genai"
        measure(genai_builder(checkpoint, graphs[GENAI], work / "genai-cache", "fp32"), OFFLINE)
    if OPTIMUM in wanted:
        graphs[OPTIMUM] = work / "optimum"
        older = compatible(checkpoint, work / "compatible")
        measure(optimum_exporter(peers, older, graphs[OPTIMUM]), OFFLINE)
    return Folders(base, adapter, checkpoint, graphs, weight_bytes(checkpoint))


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's tensors, but for an embedding that is not the head: one row of it is read."""
    with Checkpoint(folder) as checkpoint:
        sizes = {
            name: checkpoint.dtype(name).itemsize * math.prod(checkpoint.shape(name))
            for name in checkpoint.names
        }
    if "lm_head.weight" in sizes:
        del sizes["model.embed_tokens.weight"]
    return sum(sizes.values())


def prompt(base: Path, length: int) -> tuple[int, ...]:
    """The first tokens of a real text, the licence of this repository."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokens = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids
    if len(tokens) < length:
        raise SystemExit(f"--prompts: expected at most {len(tokens)} tokens, got {length}")
    return tuple(tokens[:length])
