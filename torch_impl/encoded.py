"""What encoding is told and what comes out, whatever the task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loracle.reference import DataError

from .batches import Row
from .data import Example
from .labels import Labels


@dataclass(frozen=True)
class EncodingSettings:
    """What is done beside tokenizing.

    Attributes:
        max_length: tokens an example may have.
        source: the data's name, for messages.
        labels: the classes, where the task has some.
        token_types: whether the model tells a text from its pair by ``token_type_ids``.
    """

    max_length: int
    source: str = "training data"
    labels: Labels | None = None
    token_types: bool = False

    def place(self, example: Example) -> str:
        """Return where a message says that ``example`` stands."""
        return f"{self.source}, line {example.line}"


@dataclass(frozen=True)
class EncodedData:
    """Encoded examples, how many of them were shortened and how many left out to respect ``max_length``."""

    examples: tuple[Row, ...]
    shortened: int
    left_out: int


def encode_each(
    examples: Sequence[Example],
    encode: Callable[[Example], Row | None],
    settings: EncodingSettings,
    expected: str,
) -> EncodedData:
    """Encode examples, leaving out those for which ``encode`` returns None, which do not fit.

    Args:
        examples: to encode.
        encode: one of them.
        settings: for the message.
        expected: what should have fitted, for the message.

    Raises:
        DataError: none fits.
    """
    encoded = [encode(example) for example in examples]
    kept = tuple(one for one in encoded if one is not None)
    if not kept:
        raise DataError(
            f"{settings.source}: expected {expected} of at most max_length {settings.max_length} tokens, "
            f"got {len(encoded)} examples of which none fits; raise max_length"
        )
    return EncodedData(kept, sum(one.shortened for one in kept), len(encoded) - len(kept))
