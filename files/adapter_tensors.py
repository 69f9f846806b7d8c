"""An adapter's arrays under the keys of PEFT's files, taken apart and put together."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.reference import FileError

from .adapter_checks import holds_parameter, module_targeted, wrappers_of
from .config import LoraConfig
from .lora_pair import LoraPair
from .peft_keys import BASE, PREFIX, SUFFIXES, adapter_name_in, copy_in_wrapper, split_key, unwrap
from .safetensors_file import DTYPES

Arrays = Mapping[str, NDArray[Any]]

_ORDER = (
    *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64"),
    *("I64", "U64"),
)
"""The safetensors library's order of dtypes; it writes the last ones first."""

_RANK = {DTYPES[code]: rank for rank, code in enumerate(_ORDER)}


@dataclass(frozen=True, eq=False)
class ParsedArrays:
    """What is in a file, by name; see `Adapter`."""

    pairs: Mapping[str, LoraPair]
    tensors: Arrays
    tokens: Arrays


def parse_arrays(config: LoraConfig, arrays: Arrays) -> ParsedArrays:
    """Return copies of a file's arrays under the names that they have in the base model.

    Raises:
        FileError: a key is not understood, two are of one tensor, or a part of a pair is missing.
    """
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for key in arrays:
        split = split_key(key)
        if split is None:
            raise _not_understood(key)
        path, part = split
        if part == "tensor":
            whole[path] = key
        else:
            parts.setdefault(path, {})[part] = key
    tokens = {path: own.pop("tokens") for path, own in parts.items() if "tokens" in own}
    parts = {path: own for path, own in parts.items() if own}
    pairs: dict[str, LoraPair] = {}
    home: dict[str, str] = {}
    for wrapped, own in sorted(parts.items()):
        path, kind = _place(config, wrapped, own, parts)
        if path in home:
            raise _twice(path, PREFIX + home[path], PREFIX + wrapped)
        home[path] = wrapped
        pairs[path] = _pair(config, path, kind, {part: np.array(arrays[key]) for part, key in own.items()})
    rows = {path: np.array(arrays[key]) for path, key in sorted(tokens.items())}
    return ParsedArrays(pairs, _whole_tensors(config, whole, arrays, parts, tokens), rows)


def arrays_by_key(
    config: LoraConfig, pairs: Mapping[str, LoraPair], tensors: Arrays, tokens: Arrays
) -> Arrays:
    """Return the arrays of an adapter under their keys, in the order of the safetensors library."""
    wrappers = wrappers_of(config, pairs)
    found: dict[str, NDArray[Any]] = {}
    for path, pair in pairs.items():
        embedding = "embedding_" if pair.kind == "embedding" else ""
        own = {
            f"{embedding}A": pair.A,
            f"{embedding}B": pair.B,
            "bias": pair.bias,
            "magnitude": pair.magnitude,
        }
        found |= {wrappers.key(path, part): array for part, array in own.items() if array is not None}
    found |= {wrappers.tensor_key(name, tokens): array for name, array in tensors.items()}
    found |= {f"{PREFIX}{path}{SUFFIXES['tokens']}": rows for path, rows in tokens.items()}
    return dict(sorted(found.items(), key=lambda item: (-_RANK[item[1].dtype], item[0])))


def _not_understood(key: str) -> FileError:
    name = adapter_name_in(key)
    if name is not None:
        return FileError(
            f"tensor {key} is not understood: {name!r} is an adapter's name, as in a model's own state dict; "
            f"save it with PEFT's save_pretrained"
        )
    return FileError(
        f"tensor {key} is not understood, expected {PREFIX}<module>{SUFFIXES['A']}, {SUFFIXES['B']} and the "
        f"like; is it of a variant of LoRA?"
    )


def _twice(name: str, one: str, other: str) -> FileError:
    return FileError(
        f"{one} and {other} are both of {name}; PEFT writes that where a layer is adapted twice: "
        f"train the adapter with one target for it"
    )


def _place(
    config: LoraConfig, wrapped: str, own: Mapping[str, str], wrappers: Collection[str]
) -> tuple[str, str]:
    """Return the path and the kind of the pair at a wrapped path; a linear one's may be a convolution's."""
    embedding = "embedding_" if "embedding_A" in own or "embedding_B" in own else ""
    for part in (f"{embedding}A", f"{embedding}B"):
        if part not in own:
            raise FileError(f"{PREFIX}{wrapped}{SUFFIXES[part]} is missing; was the copy complete?")
    for part in ("A", "B") if embedding else ():
        if part in own:
            raise _twice(wrapped, own[part], own[f"embedding_{part}"])
    path, depth = unwrap(wrapped, wrappers)
    if embedding:
        return path, "embedding"
    holders = [name for name in config.target_parameters or () if holds_parameter(path, name)]
    named = any("." in name for name in holders)
    if depth or f"{wrapped}{BASE}" in wrappers or named or (holders and not module_targeted(config, path)):
        if not holders:
            raise FileError(
                f"tensor {own['A']} is of a parameter of {path}, which target_parameters "
                f"{config.target_parameters!r} do not name; config and weights are of different adapters"
            )
        return path + BASE * depth, "parameter"
    return path, "linear"


def _pair(config: LoraConfig, path: str, kind: str, own: Arrays) -> LoraPair:
    embedding = "embedding_" if kind == "embedding" else ""
    A = own[f"{embedding}A"]
    return LoraPair(
        A,
        own[f"{embedding}B"],
        config.scaling_of(path),
        "convolution" if kind == "linear" and A.ndim > 2 else kind,
        own.get("bias"),
        own.get("magnitude"),
    )


def _whole_tensors(
    config: LoraConfig,
    whole: Mapping[str, str],
    arrays: Arrays,
    wrappers: Collection[str],
    tokens: Collection[str],
) -> Arrays:
    """Return whole tensors by name; what a saved module's wrapper repeats or never uses is left out."""
    found: dict[str, NDArray[Any]] = {}
    repeated: list[tuple[str, str]] = []
    keys: dict[str, str] = {}
    for wrapped, key in sorted(whole.items()):
        copy = copy_in_wrapper(wrapped)
        if copy is not None and config.saves(copy.module):
            if copy.is_trained:
                repeated.append((key, copy.name))
            continue
        name, _ = unwrap(wrapped, wrappers, tokens)
        if name in keys:
            raise _twice(name, keys[name], key)
        keys[name] = key
        found[name] = np.array(arrays[key])
    for key, name in repeated:
        if name not in found or found[name].tobytes() != arrays[key].tobytes():
            raise FileError(
                f"tensor {key} is not understood, expected the same numbers as {PREFIX}{name}; save the "
                f"adapter again with PEFT"
            )
    return found
