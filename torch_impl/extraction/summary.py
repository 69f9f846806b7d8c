"""What an extraction found and wrote."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExtractedTensor:
    """A weight with a low-rank update, and what the factors that were written miss of its difference D.

    Attributes:
        name: of the base's tensor.
        shape: as it is stored.
        r: the rank; 0 where nothing of a budget was spent on it.
        dtype: of the factors, as they were written.
        frobenius: ``||D||_F``.
        frobenius_residual: ``||D - scaling * B @ A||_F``.
        relative_residual: that over ``||D||_F``.
        spectral_residual: an estimate of ``||D - scaling * B @ A||_2`` by power iteration, from below.
        unequal: how many entries of the correctly rounded merge are not the tuned checkpoint's, bit for bit.
        entries: of the weight.
        refinements: how many steps were taken to bring every entry into the interval that rounds to the tuned
            one; None where the difference is not of that rank but for roundings, so that none were.
    """

    name: str
    shape: tuple[int, ...]
    r: int
    dtype: str | None
    frobenius: float
    frobenius_residual: float
    relative_residual: float
    spectral_residual: float
    unequal: int
    entries: int
    refinements: int | None = None


@dataclass(frozen=True)
class OtherTensor:
    """A tensor that differs and has no low-rank update.

    Attributes:
        name: of the base's tensor.
        shape: as it is stored.
        frobenius: the norm of the difference.
        saved: whether the adapter brings it whole.
        why: what kept it from an update, or from being saved.
    """

    name: str
    shape: tuple[int, ...]
    frobenius: float
    saved: bool
    why: str


@dataclass(frozen=True)
class ExtractionSummary:
    """The adapter that was written.

    Attributes:
        out: its folder.
        tensors: the weights with updates, in the base's order.
        others: what differs besides.
        same: how many tensors do not differ.
        parameters: the entries of all the adapter's tensors.
        nbytes: of its files.
    """

    out: Path
    tensors: tuple[ExtractedTensor, ...]
    others: tuple[OtherTensor, ...]
    same: int
    parameters: int
    nbytes: int

    @property
    def complete(self) -> bool:
        """Whether everything that differs is in the adapter."""
        return all(other.saved for other in self.others)

    @property
    def exact(self) -> bool:
        """Whether the adapter's correctly rounded merge is the tuned checkpoint, bit for bit."""
        return self.complete and all(tensor.unequal == 0 for tensor in self.tensors)
