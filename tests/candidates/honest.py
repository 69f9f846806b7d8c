"""Candidates that people's tools make as they are meant to be used."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from loracle.export.verification.verdict import Verdict

from . import graphs, merges
from .case import Case, Maker
from .subjects import Subject

DTYPES = ("float32", "bfloat16", "float16")
ROUNDED = (Verdict.EXACT, Verdict.ROUNDED_TWICE, Verdict.WITHIN_ULPS)
OUTPUTS = "logits"
"""A part of the name of the check of outputs."""
PRODUCTS = "products and no adapter"
"""A part of the name of the check of a graph of others."""
USE = "use it"
CLOSE = "use it; `--exact` asks for one rounding, which `loracle merge` does"


def checkpoint(merge: merges.Merge) -> Maker:
    """A maker of (base, adapter, out) for a subject."""
    return lambda subject, out: merge(subject.base, subject.adapter, out)


def exported(merge: merges.Merge, export: graphs.Export) -> Maker:
    """What an exporter makes of a merged checkpoint."""

    def make(subject: Subject, out: Path) -> Path:
        merged = merge(subject.base, subject.adapter, out.with_name(f"{out.name} merged"))
        return export(merged, out)

    return make


def kept(name: str, make: Maker) -> Maker:
    """A maker that works once for each subject, and then copies what it has made."""

    def copied(subject: Subject, out: Path) -> Path:
        first = subject.adapter.parent / name
        if not first.exists():
            make(subject, first)
        shutil.copytree(first, out)
        return out

    return copied


def at_once(export: graphs.Export) -> Maker:
    """What an exporter makes of a base that it is given with the adapter."""
    return lambda subject, out: export(subject.base, out, adapter=subject.adapter)


CHECKPOINTS = [
    Case(
        "merged",
        "loracle merge",
        (*DTYPES, "float32, all linear", "bfloat16, all linear", "GPT-2", "BERT classifier"),
        checkpoint(merges.by_loracle),
        (Verdict.EXACT,),
        True,
        USE,
        quick=True,
    ),
    Case(
        "merged into bfloat16",
        "loracle merge --dtype bfloat16",
        ("float32",),
        checkpoint(partial(merges.by_loracle, dtype="bfloat16")),
        (Verdict.EXACT,),
        True,
        USE,
    ),
    Case(
        "merged",
        "PEFT, `merge_and_unload()`",
        (
            *DTYPES,
            "bfloat16, float32 adapter",
            "float32, all linear",
            "bfloat16, all linear",
            "GPT-2",
            "BERT classifier",
        ),
        checkpoint(merges.by_peft),
        ROUNDED,
        True,
        CLOSE,
        quick=True,
    ),
    Case(
        "merged, saved in many files",
        "PEFT, `merge_and_unload()`",
        ("float32",),
        checkpoint(partial(merges.by_peft, shard="60KB")),
        ROUNDED,
        True,
        CLOSE,
    ),
    Case(
        "merged",
        "PEFT, `merge_and_unload(safe_merge=True)`",
        (*DTYPES, "bfloat16, all linear"),
        checkpoint(partial(merges.by_peft, safe=True)),
        ROUNDED,
        True,
        CLOSE,
    ),
    Case(
        "base loaded in bfloat16, merged",
        "PEFT, `merge_and_unload()`",
        ("float32",),
        checkpoint(partial(merges.by_peft, dtype="bfloat16")),
        ROUNDED,
        True,
        CLOSE,
    ),
    Case(
        "merged and unmerged once, then merged",
        "PEFT, `merge_adapter()`",
        DTYPES,
        checkpoint(partial(merges.by_peft, cycles=1)),
        ROUNDED,
        True,
        CLOSE,
    ),
    Case(
        "merged and unmerged 100 times, then merged",
        "PEFT, `merge_adapter()`",
        ("float32",),
        checkpoint(partial(merges.by_peft, cycles=100)),
        ROUNDED,
        True,
        CLOSE,
    ),
    Case(
        "merged and unmerged 100 times, then merged",
        "PEFT, `merge_adapter()`",
        ("bfloat16", "float16"),
        checkpoint(partial(merges.by_peft, cycles=100)),
        (Verdict.DRIFTED,),
        False,
        "load the base again, and merge once",
    ),
    Case(
        "merged",
        "loralib, `eval()`",
        (*DTYPES, "float32, all linear"),
        checkpoint(merges.by_loralib),
        ROUNDED,
        True,
        CLOSE,
    ),
    # The same update is added and taken off each time: after a hundred times the bits are those of one merge.
    Case(
        "evaluated 100 times in training, then merged",
        "loralib, `train()` and `eval()`",
        DTYPES,
        checkpoint(partial(merges.by_loralib, cycles=100)),
        ROUNDED,
        True,
        CLOSE,
    ),
    Case(
        "merged",
        "torch, `W + scaling * (B @ A)`",
        (*DTYPES, "bfloat16, float32 adapter", "bfloat16, all linear"),
        checkpoint(merges.by_hand),
        ROUNDED,
        True,
        CLOSE,
    ),
]

GRAPHS = [
    Case(
        "merged and exported",
        "loracle export",
        ("float32", "bfloat16", "float32, all linear", "GPT-2", "BERT classifier"),
        at_once(graphs.by_loracle),
        (Verdict.EXACT,),
        True,
        USE,
    ),
    Case(
        "merged and exported in float16",
        "loracle export --dtype fp16",
        ("float32",),
        at_once(partial(graphs.by_loracle, dtype="fp16")),
        (Verdict.EXACT,),
        True,
        USE,
    ),
    Case(
        "exported by the genai builder",
        "loracle merge",
        ("float32", "float32, all linear"),
        exported(merges.by_loracle, graphs.by_genai),
        (Verdict.EXACT,),
        True,
        USE,
    ),
    Case(
        "merged in bfloat16, exported in float32 by the genai builder",
        "loracle merge",
        ("bfloat16",),
        exported(merges.by_loracle, graphs.by_genai),
        ROUNDED,
        True,
        CLOSE,
    ),
    Case(
        "merged in bfloat16, exported in float32 by the genai builder",
        "PEFT",
        ("bfloat16", "bfloat16, all linear"),
        exported(merges.by_peft, graphs.by_genai),
        ROUNDED,
        True,
        CLOSE,
    ),
    Case(
        "exported by the genai builder",
        "PEFT",
        ("float32",),
        exported(merges.by_peft, graphs.by_genai),
        ROUNDED,
        True,
        CLOSE,
    ),
    Case(
        "exported in float16 by the genai builder",
        "PEFT",
        ("float32",),
        exported(merges.by_peft, partial(graphs.by_genai, precision="fp16")),
        ROUNDED,
        True,
        CLOSE,
    ),
    Case(
        "exported by torch.onnx.export",
        "PEFT",
        ("float32", "float32, all linear", "GPT-2", "BERT classifier"),
        exported(merges.by_peft, graphs.by_torch),
        ROUNDED,
        True,
        CLOSE,
    ),
    Case(
        "exported by Optimum",
        "PEFT",
        ("float32", "GPT-2", "BERT classifier"),
        exported(merges.by_peft, graphs.by_optimum),
        ROUNDED,
        True,
        CLOSE,
    ),
    Case(
        "exported with `adapter_path`",
        "genai builder",
        ("float32",),
        at_once(graphs.by_genai),
        (Verdict.MISSING,),
        False,
        "merge first (`loracle merge`), and build from the merged checkpoint",
        failing=(PRODUCTS,),
    ),
]
