"""The classes that a classifier tells apart: collected from the data, numbered once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loracle.reference import DataError

from .data import Example, Labelled, Tagged


@dataclass(frozen=True)
class Labels:
    """The classes' names in the order of their numbers; a class that the data numbers has its digits for a
    name."""

    names: tuple[str, ...]

    @property
    def id2label(self) -> dict[int, str]:
        """What a transformers configuration calls this."""
        return dict(enumerate(self.names))

    @property
    def label2id(self) -> dict[str, int]:
        """The other way round."""
        return {name: number for number, name in enumerate(self.names)}

    def index(self, label: str | int, where: str) -> int:
        """Return the number of a class.

        Raises:
            DataError: there is no such class; the message starts with ``where``.
        """
        try:
            return self.names.index(str(label))
        except ValueError:
            raise DataError(
                f"{where}: expected one of the classes {_shown(self.names)}, got {str(label)!r}; "
                "only classes of the training data can be told apart"
            ) from None

    def in_order_of(self, id2label: Mapping[int, str] | None) -> "Labels":
        """Return these classes as ``id2label`` numbers them, where it has the same names; else themselves.

        So the rows of a classifier that was trained before keep their meaning.
        """
        known = tuple(name for _, name in sorted((id2label or {}).items()))
        return Labels(known) if sorted(known) == sorted(self.names) else self


def collect_labels(examples: Iterable[Example], source: str) -> Labels:
    """Return the classes of ``examples``, sorted: names as strings, numbers by value.

    Raises:
        DataError: some classes are named and others numbered, or there are fewer than two; the message
            starts with ``source``, the name of the data.
    """
    first: dict[str | int, int] = {}
    for example in examples:
        assert isinstance(example, Labelled | Tagged), example
        found = (example.label,) if isinstance(example, Labelled) else example.tags
        for label in found:
            first.setdefault(label, example.line)
    names = sorted(label for label in first if isinstance(label, str))
    numbers = sorted(label for label in first if isinstance(label, int))
    if names and numbers:
        raise DataError(
            f"{source}: expected classes that are all names or all integers, got {names[0]!r} in line "
            f"{first[names[0]]} and {numbers[0]} in line {first[numbers[0]]}"
        )
    labels = Labels(tuple(names) or tuple(map(str, numbers)))
    if len(labels.names) < 2:
        raise DataError(
            f"{source}: expected at least two classes, got {_shown(labels.names)} alone; there is nothing to "
            "tell apart"
        )
    return labels


def _shown(names: tuple[str, ...], most: int = 8) -> str:
    listed = ", ".join(map(repr, names[:most]))
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
