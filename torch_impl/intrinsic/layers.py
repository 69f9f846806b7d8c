"""Which parameters are one layer: those that share a lambda in SAID."""

from collections.abc import Iterable


def layer_of(name: str) -> str:
    """Return the layer of a parameter by its name in the model: a transformer block, or what is beside them.

    A block is a member of a list of modules: the name up to its first number (``bert.encoder.layer.3``). Of
    another parameter it is the first two modules (``bert.embeddings``, ``model.norm``), or the one that there
    is (``classifier``).
    """
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: at + 1])
    return ".".join(parts[: max(1, min(2, len(parts) - 1))])


def number_layers(names: Iterable[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return each parameter's layer, counted from 0 in their order, and the layers' names."""
    numbers: dict[str, int] = {}
    found = tuple(numbers.setdefault(layer_of(name), len(numbers)) for name in names)
    return found, tuple(numbers)
