"""The ways from a base model and an adapter to ONNX that `benchmarks.export` compares: their commands."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loracle.export.options import DTYPES

from .peers import OFFLINE, genai_builder, optimum_exporter, peft_merge, torch_exporter
from .process import Measured, measure, one_after_the_other

CACHED = "loracle, graph cached"
CONTROL = "A/A control"
FIRST = "loracle, first export"
BUILDER = "PEFT + genai builder"
TORCH = "PEFT + torch.onnx.export"
OPTIMUM = "PEFT + Optimum"
FLOOR = "disk floor"
WAYS = (CACHED, CONTROL, FIRST, BUILDER, TORCH, OPTIMUM)


@dataclass(frozen=True)
class Way:
    """Commands that run in turn, each in a fresh process.

    Attributes:
        out: the folder that they make, with a `model.onnx` in it.
        leftovers: what else they leave; all is removed before and after.
        environment: beside the common one.
    """

    name: str
    out: Path
    commands: Sequence[Sequence[str]]
    leftovers: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def clear(self) -> None:
        """Remove what the commands make."""
        for path in (self.out, *self.leftovers):
            shutil.rmtree(path, ignore_errors=True)

    def run(self) -> Measured:
        """Run the commands; `out` is there then. What others wrote is on the disk before."""
        self.clear()
        os.sync()
        environment = {**OFFLINE, **self.environment}
        return one_after_the_other([measure(command, environment) for command in self.commands])


@dataclass(frozen=True)
class Job:
    """What is exported, and where.

    Attributes:
        base: the model, `adapter`: what is merged into it.
        work: a folder for all that is made.
        precision: "fp32" or "fp16".
        peers: the Python that has Optimum.

    PEFT merges in the dtype of the export, so that it rounds once, as loracle does.
    """

    base: Path
    adapter: Path
    work: Path
    precision: str
    peers: Path

    @property
    def cache(self) -> Path:
        """Holds the graph for the exports that find it."""
        return self.work / "cache"

    def way(self, name: str) -> Way:
        """The way of one of the names in `WAYS`."""
        out = self.work / "out"
        if name in (CACHED, CONTROL):
            return Way(name, out, [self._loracle(out)], environment=_caching(self.cache))
        if name == FIRST:
            empty = self.work / "first-cache"
            return Way(name, out, [self._loracle(out)], [empty], _caching(empty))
        dtype = str(DTYPES[self.precision])
        if name == TORCH:
            return Way(name, out, [torch_exporter(self.base, self.adapter, out, dtype)])
        merged = self.work / "merged"
        if name == BUILDER:
            builder_cache = self.work / "builder-cache"
            commands = [
                peft_merge(sys.executable, self.base, self.adapter, merged, dtype),
                genai_builder(merged, out, builder_cache, self.precision),
            ]
            return Way(name, out, commands, [merged, builder_cache])
        commands = [
            peft_merge(str(self.peers), self.base, self.adapter, merged, dtype),
            optimum_exporter(self.peers, merged, out),
        ]
        return Way(name, out, commands, [merged])

    def floor(self, nbytes: int) -> Way:
        """Reading the base model and writing `nbytes`."""
        out = self.work / "out"
        command = [
            sys.executable,
            "-S",
            "-m",
            "benchmarks.export_floor",
            str(self.base),
            str(out),
            str(nbytes),
        ]
        return Way(FLOOR, out, [command])

    def _loracle(self, out: Path) -> list[str]:
        program = [sys.executable, "-m", "loracle.cli", "export", "--model", str(self.base)]
        return [*program, "--adapter", str(self.adapter), "--dtype", self.precision, "--out", str(out)]


def _caching(folder: Path) -> Mapping[str, str]:
    return {"LORACLE_CACHE": str(folder)}
