"""The names of the tensors in PEFT's adapter files, as functions of strings.

PEFT puts a wrapper in the place of an adapted module and the module itself below it, as ``base_layer``. What
lies in an adapted module (a trained bias, ``out_proj`` of a MultiheadAttention) has that component in its
name, and stacked parameters of one module have a wrapper each, one inside the other. A *name* is where a
tensor belongs in the plain model, without wrappers; a *key* is its name in the file.

Source: PEFT 0.21, ``get_peft_model_state_dict``, ``lora.ParamWrapper`` and ``utils.other``'s wrappers.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PREFIX = "base_model.model."
BASE = ".base_layer"
_TOKENS = ".token_adapter"

SUFFIXES: Mapping[str, str] = {
    "A": ".lora_A.weight",
    "B": ".lora_B.weight",
    "bias": ".lora_B.bias",
    "embedding_A": ".lora_embedding_A",
    "embedding_B": ".lora_embedding_B",
    "magnitude": ".lora_magnitude_vector",
    "tokens": f"{_TOKENS}.trainable_tokens_delta",
}
"""Part of an adapter and how its key ends."""

_WITH_ADAPTER_NAME = re.compile(
    r"\.(?:lora_[AB]\.(?P<a>[^.]+)\.(?:weight|bias)"
    r"|(?:lora_embedding_[AB]|trainable_tokens_delta)\.(?P<b>[^.]+)"
    r"|lora_magnitude_vector\.(?P<c>[^.]+)(?:\.weight)?"
    r"|modules_to_save\.(?P<d>[^.]+)\.(?:weight|bias))$"
)


def split_key(key: str) -> tuple[str, str] | None:
    """Return the wrapped path and the part of a key, or a whole tensor's wrapped name and "tensor".

    Returns:
        None for a key that is neither: one without the prefix or a path, or with a part that is not known.
    """
    rest = key.removeprefix(PREFIX)
    if rest == key:
        return None
    for part, suffix in SUFFIXES.items():
        if rest.endswith(suffix):
            path = rest.removesuffix(suffix)
            return (path, part) if path else None
    return (rest, "tensor") if rest and not rest.startswith(".") and ".lora_" not in f".{rest}" else None


def adapter_name_in(key: str) -> str | None:
    """Return the adapter's name in a key of a model's own state dict, which files are without; else None."""
    found = _WITH_ADAPTER_NAME.search(key)
    return None if found is None else next(group for group in found.groups() if group is not None)


def unwrap(path: str, wrappers: Collection[str], tokens: Collection[str] = ()) -> tuple[str, int]:
    """Return a wrapped path without its wrappers, and how many there were at its end.

    Args:
        path: as it stands in the file. A component ``base_layer`` is a wrapper's where a pair lies above it;
            a model may have modules of that name.
        wrappers: the wrapped paths of all pairs.
        tokens: the paths of the embeddings with trained rows.
    """
    depth = 0
    while path.endswith(BASE) and path.removesuffix(BASE) in wrappers:
        path, depth = path.removesuffix(BASE), depth + 1
    kept: list[str] = []
    above = ""
    for component in path.split("."):
        if component == "base_layer" and above.removesuffix(_TOKENS) in tokens and above.endswith(_TOKENS):
            kept.pop()
        elif component != "base_layer" or above not in wrappers:
            kept.append(component)
        above = f"{above}.{component}" if above else component
    return ".".join(kept), depth


def wrap(name: str, depths: Mapping[str, int], tokens: Collection[str] = ()) -> str:
    """Return the path of a name in the file, the opposite of `unwrap`.

    Args:
        name: of a module, or of a tensor in one.
        depths: how many wrappers each adapted module has.
        tokens: the paths of the embeddings with trained rows.
    """
    wrapped, above = "", ""
    for component in name.split("."):
        wrapped = f"{wrapped}.{component}" if wrapped else component
        above = f"{above}.{component}" if above else component
        if above != name:
            wrapped += BASE * depths.get(above, 0)
            if above in tokens:
                wrapped += _TOKENS + BASE
    return wrapped


@dataclass(frozen=True)
class Wrappers:
    """Where the pairs of one adapter lie in a file.

    Attributes:
        depths: how many wrappers each adapted module has.
        paths: each pair's wrapped path.
        stacked: the paths of each module's stacked parameters, in their order.
    """

    depths: Mapping[str, int]
    paths: Mapping[str, str]
    stacked: Mapping[str, Sequence[str]]

    @staticmethod
    def of(modules: Iterable[str], parameters: Iterable[str], named: Callable[[str], bool]) -> "Wrappers":
        """Return the wrappers of the pairs of ``modules`` and of stacked ``parameters``.

        A parameter's path is the module's and its name, where it is ``named``; the first of a module lies
        innermost. Else it is the module's path and a component ``base_layer`` for each wrapper around it.
        """
        depths = dict.fromkeys(modules, 1)
        stacked: dict[str, list[str]] = {}
        for path in parameters:
            module = path.rpartition(".")[0] if named(path) else without_base_layers(path)[0]
            stacked.setdefault(module, []).append(path)
        own = list(depths)
        depths |= {module: len(paths) for module, paths in stacked.items()}
        wrapped = {path: wrap(path, depths) for path in own}
        for module, paths in stacked.items():
            for number, path in enumerate(paths):
                around = len(paths) - 1 - number if named(path) else without_base_layers(path)[1]
                wrapped[path] = wrap(module, depths) + BASE * around
        return Wrappers(depths, wrapped, stacked)

    def key(self, path: str, part: str) -> str:
        """Return the key of one part of a pair."""
        return f"{PREFIX}{self.paths[path]}{SUFFIXES[part]}"

    def tensor_key(self, name: str, tokens: Collection[str]) -> str:
        """Return the key of a whole tensor, where ``tokens`` are the embeddings with trained rows."""
        return PREFIX + wrap(name, self.depths, tokens)


def without_base_layers(path: str) -> tuple[str, int]:
    """Return a path without the components ``base_layer`` at its end, and their number."""
    stem = path
    while stem.endswith(BASE):
        stem = stem.removesuffix(BASE)
    return stem, (len(path) - len(stem)) // len(BASE)


class WrapperCopy(NamedTuple):
    """A tensor that PEFT writes from within a saved module's wrapper, besides the trained one, ``name``.

    ``lm_head.modules_to_save.bias`` is ``lm_head.bias`` again; ``lm_head.original_module.bias`` is the base's
    and is never used.
    """

    module: str
    name: str
    is_trained: bool


def copy_in_wrapper(name: str) -> WrapperCopy | None:
    """Return what a tensor's name says, if the wrapper of a saved module is in it."""
    for wrapper in ("modules_to_save", "original_module"):
        module, found, below = name.partition(f".{wrapper}.")
        if found:
            return WrapperCopy(module, f"{module}.{below}", wrapper == "modules_to_save")
    return None
