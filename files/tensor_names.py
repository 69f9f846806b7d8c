"""The name under which a checkpoint holds a tensor that a model calls otherwise."""

import re
from collections.abc import Collection, Iterable

from .architectures import OLD_NAMES, Architecture, Renames


class TensorNames:
    """The names in a checkpoint, for finding one by the name that a model or an adapter has for it.

    A checkpoint saved from a class without a head lacks the prefix of the body's names (``bert.``,
    ``transformer.``), and one with a head has it, whatever class the adapter was trained with. Besides, some
    checkpoints have names of an older layout, which transformers renames as it loads them.

    Args:
        names: in the checkpoint.
        architecture: whose prefix and renames count; None where it is not known.
    """

    def __init__(self, names: Iterable[str], architecture: Architecture | None) -> None:
        self._names = frozenset(names)
        self._prefix = None if architecture is None else f"{architecture.prefix}."
        self._renames: Renames = () if architecture is None else (*architecture.renames, *OLD_NAMES)
        self._by_new_name: dict[str, list[str]] = {}
        for name in self._names if self._renames else ():
            self._by_new_name.setdefault(self._renamed(name), []).append(name)

    def find(self, name: str) -> str | None:
        """Return the checkpoint's name of a tensor, or None where there is none, or more than one.

        It is the very name; else that with the prefix added or removed; else the one that transformers makes
        the same of, with or without the prefix.
        """
        if name in self._names:
            return name
        found = [other for other in self._variants(name) if other in self._names]
        if not found and self._renames:
            new = self._renamed(name)
            found = self._by_new_name.get(new, [])
            if not found:
                found = [own for other in self._variants(new) for own in self._by_new_name.get(other, [])]
        return found[0] if len(found) == 1 else None

    def _variants(self, name: str) -> tuple[str, ...]:
        if self._prefix is None:
            return ()
        shorter = (name.removeprefix(self._prefix),) if name.startswith(self._prefix) else ()
        return (self._prefix + name, *shorter)

    def _renamed(self, name: str) -> str:
        for pattern, target in self._renames:
            name = re.sub(pattern, target, name)
        return name


def resolve_name(name: str, names: Collection[str], architecture: Architecture | None) -> str | None:
    """Return the name in ``names`` of the tensor that a model calls ``name``; see `TensorNames.find`."""
    return TensorNames(names, architecture).find(name)
