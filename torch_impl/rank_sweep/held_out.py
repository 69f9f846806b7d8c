"""The two files that all cells learn from and are measured on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loracle.reference import DataError

from ..data import Example, read_examples
from ..question import question_share
from ..tasks import Task
from .options import RankSweepOptions


@dataclass(frozen=True)
class Divided:
    """The lines of a sweep's data.

    Attributes:
        train, held_out: the bytes of two JSON Lines files.
        examples: to learn from.
        train_rows, held_out_rows: how many of each.
        digests: SHA-256 of the user's files, by name.
    """

    train: bytes
    held_out: bytes
    examples: Sequence[Example]
    train_rows: int
    held_out_rows: int
    digests: dict[str, str]


def read_divided(options: RankSweepOptions, task: Task) -> Divided:
    """Read the data, and divide it where nothing is given to measure on.

    Where an example goes is decided by the SHA-256 of what is asked in it, white space and case apart: the
    same question is never on both sides.

    Raises:
        FileError, DataError: see `read_examples`; or a side is empty.
    """
    examples = read_examples(options.data, task.forms)
    content = options.data.read_bytes()
    digests = {"data_sha256": hashlib.sha256(content).hexdigest()}
    if options.eval_data is not None:
        others = read_examples(options.eval_data, task.forms)
        held_out = options.eval_data.read_bytes()
        digests["eval_data_sha256"] = hashlib.sha256(held_out).hexdigest()
        return Divided(content, held_out, examples, len(examples), len(others), digests)
    sides = split(examples, options.eval_share)
    for name, side in zip(("learn from", "measure on"), sides, strict=True):
        if not side:
            raise DataError(
                f"{options.data}: expected examples to learn from and to measure on, got {len(examples)} of "
                f"which none is left to {name}; give more, another eval_share, or eval_data"
            )
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    train, held_out = (b"".join(lines[one.line - 1] + b"\n" for one in side) for side in sides)
    return Divided(train, held_out, sides[0], len(sides[0]), len(sides[1]), digests)


def split(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Return (train, held out), each in the order given."""
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[question_share(example) < share].append(example)
    return sides


def files_in(folder: Path, divided: Divided) -> tuple[Path, Path]:
    """Write the two files into a folder and return their paths."""
    paths = folder / "train.jsonl", folder / "held-out.jsonl"
    for path, content in zip(paths, (divided.train, divided.held_out), strict=True):
        path.write_bytes(content)
    return paths
