"""Adapter folders in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.reference import DTypeError, FileError, NonFiniteError, ShapeError, TargetError

from .atomic import output_folder
from .config import LoraConfig
from .json_file import read_json_object
from .safetensors_file import DTYPES, SafetensorsFile
from .safetensors_writer import write_safetensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
FLOATS = tuple(DTYPES[code] for code in ("F16", "BF16", "F32", "F64"))

_PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B"}


@dataclass(frozen=True, eq=False)
class LoraPair:
    """The update of one weight, ``scaling * B @ A``.

    Attributes:
        A: (r, in), any of float16, bfloat16, float32, float64.
        B: (out, r), likewise.
        scaling: alpha / r, or alpha / sqrt(r); float64.
    """

    A: NDArray[Any]
    B: NDArray[Any]
    scaling: float

    @property
    def r(self) -> int:
        return int(self.A.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the weight that the pair belongs to."""
        return int(self.B.shape[0]), int(self.A.shape[1])


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: its configuration, and one pair for each module path.

    Checked when it is made: each pair has the rank and the scaling that the configuration gives its module,
    two matrices that fit each other, a floating-point dtype, and finite entries.

    Raises:
        TargetError: no pair at all, or a module that the configuration does not target.
        ShapeError, DTypeError, NonFiniteError: a matrix is wrong; the message names its tensor.
    """

    config: LoraConfig
    pairs: Mapping[str, LoraPair]

    def __post_init__(self) -> None:
        if not self.pairs:
            raise TargetError(
                "the adapter has no lora_A and lora_B tensors; was it saved before it was trained?"
            )
        for path, pair in self.pairs.items():
            _check_pair(self.config, path, pair)

    @property
    def parameters(self) -> int:
        """The number of entries of all A and B."""
        return sum(pair.A.size + pair.B.size for pair in self.pairs.values())

    @classmethod
    def from_arrays(
        cls, config: LoraConfig, arrays: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]
    ) -> "Adapter":
        """Return the adapter with (A, B) for each module path, and scalings from ``config``."""
        return cls(config, {path: LoraPair(A, B, config.scaling_of(path)) for path, (A, B) in arrays.items()})


def read_adapter(directory: str | os.PathLike[str]) -> Adapter:
    """Return the adapter in the folder, its tensors copied into memory.

    Raises:
        FileError: the folder or one of its two files is missing or malformed, or a tensor is not understood.
        ConfigError: the configuration has an unsupported or unknown key.
        TargetError, ShapeError, DTypeError, NonFiniteError: as for ``Adapter``; the message names the file.
    """
    folder = Path(directory)
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not folder.is_dir():
        raise FileError(f"{folder}: no such adapter folder; check the path")
    if not config_path.exists():
        raise FileError(
            f"{folder}: has no {CONFIG_FILE}; is this an adapter folder written by loracle or PEFT?"
        )
    config = LoraConfig.from_json(read_json_object(config_path), str(config_path))
    if not weights_path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        remedy = "save the adapter again with PEFT, which writes it" if pickled else "was the copy complete?"
        raise FileError(f"{folder}: has no {WEIGHTS_FILE}; {remedy}")
    file = SafetensorsFile(weights_path)
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for key in file.entries:
        path, part = _split(key, weights_path)
        found.setdefault(path, {})[part] = np.array(file.tensor(key))
    for path, parts in found.items():
        for part in ("A", "B"):
            if part not in parts:
                raise FileError(f"{weights_path}: {_key(path, part)} is missing; was the copy complete?")
    try:
        return Adapter.from_arrays(
            config, {path: (parts["A"], parts["B"]) for path, parts in sorted(found.items())}
        )
    except (TargetError, ShapeError, DTypeError, NonFiniteError) as error:
        raise type(error)(f"{weights_path}: {error}") from None


def write_adapter(directory: str | os.PathLike[str], adapter: Adapter) -> None:
    """Write the adapter to a new folder, whole or not at all; equal adapters give equal bytes.

    Raises:
        FileError: ``directory`` exists and is not empty, or cannot be written.
    """
    with output_folder(directory) as folder:
        write_adapter_files(folder, adapter)


def write_adapter_files(folder: Path, adapter: Adapter) -> None:
    """Write the two files of the adapter into an existing folder; for use inside ``output_folder``.

    Raises:
        OSError: a file exists already or cannot be written.
    """
    tensors: dict[str, NDArray[Any]] = {}
    for path, pair in sorted(adapter.pairs.items()):
        tensors[_key(path, "A")] = pair.A
        tensors[_key(path, "B")] = pair.B
    with (folder / CONFIG_FILE).open("x", encoding="utf-8") as file:
        file.write(json.dumps(adapter.config.to_json(), indent=2) + "\n")
    write_safetensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})


def _key(path: str, part: str) -> str:
    return f"{PREFIX}{path}.lora_{part}.weight"


def _split(key: str, source: Path) -> tuple[str, str]:
    for suffix, part in _PARTS.items():
        path = key.removeprefix(PREFIX).removesuffix(suffix)
        if path and key == f"{PREFIX}{path}{suffix}":
            return path, part
    raise FileError(
        f"{source}: tensor {key} is not understood, expected {_key('<module>', 'A')} "
        f"and {_key('<module>', 'B')}; only LoRA of linear layers is supported"
    )


def _check_pair(config: LoraConfig, path: str, pair: LoraPair) -> None:
    if not config.targets(path):
        raise TargetError(
            f"{_key(path, 'A')}: module {path} is not targeted by the adapter's config (target_modules "
            f"{config.target_modules!r}); config and weights are of different adapters"
        )
    r = config.rank_of(path)
    for part, array, axis in (("A", pair.A, 0), ("B", pair.B, 1)):
        name = _key(path, part)
        if array.dtype not in FLOATS:
            raise DTypeError(
                f"{name}: expected a floating-point dtype, got {array.dtype}; convert the adapter"
            )
        if array.ndim != 2 or array.shape[axis] != r or 0 in array.shape:
            expected = f"({r}, in)" if part == "A" else f"(out, {r})"
            raise ShapeError(
                f"{name}: expected shape {expected} by the adapter's config, got {array.shape}; "
                f"correct r or rank_pattern"
            )
        if not np.isfinite(array).all():
            raise NonFiniteError(
                f"{name}: holds NaN or infinity, expected finite numbers; train the adapter again"
            )
    scaling = config.scaling_of(path)
    if pair.scaling != scaling:
        raise TargetError(
            f"{path}: scaling is {pair.scaling!r}, the adapter's config says {scaling!r}; use its value"
        )
