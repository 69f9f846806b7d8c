"""The folders that `benchmarks.tasks` runs, made in a process of its own.

    python -m benchmarks.tasks_folders MAKING

MAKING is the JSON of a `Making`. Makes for each way what its tasks need, all in float32, adds task after
task, and writes `folders.json`, a `Folders`. What exporters import shares no memory with what is measured.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loracle.files import Checkpoint

from .adapters import random_adapter
from .process import measure
from .tasks_ways import BAKED, CONTROL, GENAI, INPUTS, LINKED, LINKED_SHARED, PEFT, SWAPPABLE

TARGETS = ("q_proj", "v_proj")
_RANK, _ALPHA = 8, 64
_FORMS = {LINKED: "linked", SWAPPABLE: "swappable", INPUTS: "adapter-inputs"}
_HOMES = {BAKED: BAKED, CONTROL: BAKED, LINKED_SHARED: LINKED, GENAI: INPUTS}


@dataclass(frozen=True)
class Making:
    """What is to be made.

    Attributes:
        base: a folder of transformers, of Llama's architecture, in float32.
        work: where to.
        ways: of `tasks_ways`.
        tasks: how many.
        prompt: length of the prompt.
    """

    base: str
    work: str
    ways: Sequence[str]
    tasks: int
    prompt: int


@dataclass(frozen=True)
class Folders:
    """What was made.

    Attributes:
        base: the checkpoint.
        adapters: the folder that has a folder for each task.
        graphs: the folder of each way; see `tasks_ways.Opening`.
        tasks: the names.
        prompt: tokens of a real text.
        disk: for each way the bytes of its files with one task, with two, and so on.
        base_bytes, task_bytes: of all tensors of the base, and of those that a task changes.
        weight_bytes: what a token reads at least.
    """

    base: str
    adapters: str
    graphs: Mapping[str, str]
    tasks: Sequence[str]
    prompt: Sequence[int]
    disk: Mapping[str, Sequence[int]]
    base_bytes: int
    task_bytes: int
    weight_bytes: int

    def floor(self, tasks: int) -> int:
        """Bytes of one base and of what so many tasks change in it."""
        return self.base_bytes + tasks * self.task_bytes


def make_folders(making: Making) -> Folders:
    """Run this module in a process of its own.

    Raises SystemExit, with the last lines it printed, where it fails.
    """
    measure([sys.executable, "-m", "benchmarks.tasks_folders", json.dumps(asdict(making))])
    return Folders(**json.loads((Path(making.work) / "folders.json").read_text()))


def disk_bytes(*folders: Path) -> int:
    """Bytes of all files in folders."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def tensor_bytes(checkpoint: Path, targets: Sequence[str] | None = None) -> int:
    """Bytes of a checkpoint's tensors: of all, or of the weights of modules with these last names."""
    with Checkpoint(checkpoint) as opened:
        return sum(
            opened.dtype(name).itemsize * math.prod(opened.shape(name))
            for name in opened.names
            if targets is None or name.removesuffix(".weight").rpartition(".")[2] in targets
        )


def _add(way: str, base: Path, adapter: Path, folder: Path) -> None:
    """Add the task of an adapter to the folder of a way."""
    from loracle.export import export

    if way == BAKED:
        folder.mkdir(exist_ok=True)
        export(base, folder / adapter.name, adapter)
    elif way != PEFT:
        export(base, folder, adapter, form=_FORMS[way], name=adapter.name)


def _grow(way: str, base: Path, adapters: Sequence[Path], folder: Path) -> list[int]:
    """Add task after task; return the bytes of all files after each."""
    sizes = []
    for count, adapter in enumerate(adapters, 1):
        _add(way, base, adapter, folder)
        parts = (base, *adapters[:count]) if way == PEFT else (folder,)
        sizes.append(disk_bytes(*parts))
    return sizes


def main(argv: Sequence[str]) -> None:
    from .decode_folders import prompt, weight_bytes

    making = Making(**json.loads(argv[0]))
    base, work = Path(making.base), Path(making.work)
    tasks = [f"task{number:02}" for number in range(making.tasks)]
    adapters = [
        random_adapter(base, work / "adapters" / task, r=_RANK, alpha=_ALPHA, targets=TARGETS, seed=number)
        for number, task in enumerate(tasks)
    ]
    homes = {way: _HOMES.get(way, way) for way in making.ways}
    places = {home: base if home == PEFT else work / home.replace(" ", "-") for home in homes.values()}
    grown = {home: _grow(home, base, adapters, place) for home, place in places.items()}
    made = Folders(
        str(base),
        str(work / "adapters"),
        {way: str(places[home]) for way, home in homes.items()},
        tasks,
        prompt(base, making.prompt),
        {way: grown[home] for way, home in homes.items()},
        tensor_bytes(base),
        tensor_bytes(base, TARGETS),
        weight_bytes(base),
    )
    (work / "folders.json").write_text(json.dumps(asdict(made)))


if __name__ == "__main__":
    main(sys.argv[1:])
