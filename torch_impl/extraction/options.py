"""What an adapter is to be extracted by."""

import math
import re
from dataclasses import dataclass

from loracle.reference import ConfigError
from loracle.reference.arguments import check_share, is_integer

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class ExtractOptions:
    """Exactly one of the first three.

    Attributes:
        rank: of every weight.
        energy: the share of each difference's squared Frobenius norm that its smallest rank is to keep.
        nbytes: the most bytes that the adapter's two files may have; spent where a byte keeps most of the
            squared norm of all differences.
        scaling: alpha / r of every weight, not 0.
        rest: whether what differs and is no low-rank update is saved whole: ``modules_to_save`` and biases.
        seed: of the randomised decompositions of large weights.

    Raises:
        ConfigError: a value is out of range, or not one of the three is given.
    """

    rank: int | None = None
    energy: float | None = None
    nbytes: int | None = None
    scaling: float = 1.0
    rest: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.rank, self.energy, self.nbytes)) != 1:
            raise ConfigError("expected one of rank, energy and bytes; give one")
        if self.rank is not None and (not is_integer(self.rank) or self.rank < 1):
            raise ConfigError(f"rank: expected an integer of at least 1, got {self.rank!r}; choose another")
        if self.energy is not None:
            check_share(self.energy, "energy")
        if self.nbytes is not None and (not is_integer(self.nbytes) or self.nbytes < 1):
            raise ConfigError(f"bytes: expected an integer of at least 1, got {self.nbytes!r}; give more")
        if self.scaling == 0 or not math.isfinite(self.scaling):
            raise ConfigError(f"scaling: expected a finite number other than 0, got {self.scaling}; give one")


def parse_bytes(text: str) -> int:
    """Return a number of bytes from ``10MB``, ``1.5 MiB`` or ``4096``.

    Raises:
        ConfigError: it is no such number, or below 1.

    >>> parse_bytes("10MB"), parse_bytes("1.5 KiB")
    (10000000, 1536)
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", text)
    unit = None if found is None else _UNITS.get(found[2].lower())
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise ConfigError(f"bytes: expected a size such as 10MB, 512KiB or 4096, got {text!r}; correct it")
    return int(float(found[1]) * unit)
