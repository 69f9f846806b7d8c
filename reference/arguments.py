"""Checks of single numbers that are given as arguments."""

import numbers

from .errors import ConfigError


def is_integer(value: object) -> bool:
    """Return whether it is an integer, Python's or NumPy's; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Return whether it is a real number, Python's or NumPy's, possibly not a finite one; a bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_count(count: int, most: int, name: str, of: str) -> int:
    """Return a number of singular vectors as an int.

    Raises:
        ConfigError: not an integer from 1 to ``most``, which is ``of`` something.
    """
    if not is_integer(count) or not 1 <= count <= most:
        raise ConfigError(
            f"{name}: expected an integer from 1 to {most}, {of}, got {count!r}; choose another"
        )
    return int(count)


def check_share(share: float, name: str) -> float:
    """Return a share of a whole as a float.

    Raises:
        ConfigError: not a number above 0 and at most 1.
    """
    if not is_real(share) or not 0 < share <= 1:
        raise ConfigError(f"{name}: expected a number above 0 and at most 1, got {share!r}; choose another")
    return float(share)
