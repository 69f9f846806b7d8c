"""Examples divided into those that are learned, those that choose, and those that are scored."""

from collections.abc import Sequence
from dataclasses import dataclass

from loracle.reference import DataError

from ..data import Example, Labelled, Tagged, read_examples
from ..labels import Labels, collect_labels
from ..question import question_share
from ..tasks import Task
from .options import IntrinsicOptions


@dataclass(frozen=True)
class Splits:
    """Examples of one task.

    Attributes:
        train: to learn from.
        validation: to choose a learning rate on.
        test: that the score is measured on.
        labels: the classes of all.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    labels: Labels


def read_splits(options: IntrinsicOptions, task: Task) -> Splits:
    """Read the data and divide it.

    Where an example goes is decided by the SHA-256 of its text alone, white space and case apart: the same
    text is never on two sides, and more data moves nothing.

    Raises:
        FileError, DataError: see `read_examples`; or a split is empty, or the test split has one class.
    """
    examples = read_examples(options.data, task.forms)
    source, test_share = str(options.data), options.test_share
    given: Sequence[Example] | None = None
    if options.test_data is not None:
        given, test_share = read_examples(options.test_data, task.forms), 0.0
    labels = collect_labels([*examples, *(given or ())], source)
    sides = split(examples, options.validation_share, test_share)
    test = sides[2] if given is None else given
    splits = Splits(sides[0], sides[1], test, labels)
    for name in ("train", "validation", "test"):
        if not getattr(splits, name):
            raise DataError(
                f"{source}: expected examples to train, choose and score with, got {len(examples)} of which "
                f"none falls to the {name} split; give more"
            )
    for name, part in (("train", splits.train), ("test", splits.test)):
        if len({label for example in part for label in _classes(example)}) < 2:
            place = options.test_data if name == "test" and given is not None else source
            raise DataError(
                f"{place}: expected at least two classes in the {name} split, got one; {options.metric} "
                "would say nothing, give more examples"
            )
    return splits


def split(
    examples: Sequence[Example], validation_share: float, test_share: float
) -> tuple[list[Example], list[Example], list[Example]]:
    """Return (train, validation, test), each in the order given."""
    sides: tuple[list[Example], list[Example], list[Example]] = ([], [], [])
    for example in examples:
        drawn = question_share(example)
        sides[2 if drawn < test_share else 1 if drawn < test_share + validation_share else 0].append(example)
    return sides


def _classes(example: Example) -> tuple[str | int, ...]:
    assert isinstance(example, Labelled | Tagged), example
    return example.tags if isinstance(example, Tagged) else (example.label,)
