"""Adapter folders in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

Beside them ``head.json`` may say what a trained head's outputs are (`HeadConfig`).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from loracle.reference import ConfigError, DTypeError, FileError, NonFiniteError, ShapeError, TargetError

from .adapter_checks import check_pairs, check_tensors, check_tokens, wrappers_of
from .adapter_tensors import arrays_by_key, parse_arrays
from .atomic import output_folder
from .config import LoraConfig
from .config_checks import CONVERT
from .head_config import HeadConfig, read_head, write_head
from .json_file import read_json_object
from .lora_pair import FLOATS, LoraPair
from .safetensors_file import SafetensorsFile
from .safetensors_writer import write_safetensors

__all__ = ["FLOATS", "Adapter", "LoraPair", "read_adapter", "write_adapter", "write_adapter_files"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: its configuration, a pair for each weight it updates, and what is trained beside them.

    Attributes:
        config: see `LoraConfig`.
        pairs: module path to pair. For a stacked parameter it is the parameter's path, and the parameters of
            one module stand in the module's order; see `name_parameters` for what a file says of them.
        tensors: name in the base model to a whole tensor that takes its place: what ``modules_to_save`` and
            ``bias`` train, and the embeddings that PEFT copies along.
        tokens: path of an embedding to the rows, (n, d), of the tokens that are trained, in the order of
            ``trainable_token_indices``. They are the rows' values, not differences from the base's.
        head: what the model's configuration says of a head that is trained whole, where it is known.

    Checked when it is made: each pair has the rank and the scaling that the configuration gives its module,
    arrays that fit each other, a floating-point dtype, and finite entries, and a bias and a magnitude where
    the configuration says so; every other tensor is one that the configuration trains.

    Raises:
        TargetError: no pair at all, or a tensor that the configuration does not ask for, or without one that
            it does.
        ShapeError, DTypeError, NonFiniteError: an array is wrong; the message names its tensor.
    """

    config: LoraConfig
    pairs: Mapping[str, LoraPair]
    tensors: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    tokens: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    head: HeadConfig | None = None

    def __post_init__(self) -> None:
        if not self.pairs:
            raise TargetError(
                "the adapter has no lora_A and lora_B tensors; was it saved before it was trained?"
            )
        wrappers = wrappers_of(self.config, self.pairs)
        check_pairs(self.config, self.pairs, wrappers)
        check_tensors(self.config, self.tensors, self.pairs, self.tokens, wrappers)
        check_tokens(self.config, self.tokens, self.pairs)

    @property
    def parameters(self) -> int:
        """The number of entries of all tensors."""
        others = (*self.tensors.values(), *self.tokens.values())
        return sum(pair.size for pair in self.pairs.values()) + sum(array.size for array in others)

    @classmethod
    def from_arrays(
        cls, config: LoraConfig, arrays: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]
    ) -> "Adapter":
        """Return the adapter of linear layers with (A, B) for each path, and scalings from ``config``."""
        return cls(config, {path: LoraPair(A, B, config.scaling_of(path)) for path, (A, B) in arrays.items()})


def read_adapter(directory: str | os.PathLike[str], *, residual_base: bool = False) -> Adapter:
    """Return the adapter in the folder, its tensors copied into memory.

    Stacked parameters have no names in a file: they come as ``kind`` "parameter" under their module's path,
    with a component ``base_layer`` for each one that is wrapped around it; `name_parameters` names them.

    Args:
        directory: an adapter folder, as PEFT or `write_adapter` writes it.
        residual_base: whether the caller has the base that an adapter of PiSSA or OLoRA belongs to, from
            which its start was taken away.

    Raises:
        FileError: the folder or one of its files is missing or malformed, or a tensor is not understood.
        ConfigError: the configuration has an unsupported or unknown key, or the adapter belongs to a
            residual base.
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
    content = read_json_object(config_path)
    config = LoraConfig.from_json(content, str(config_path))
    head = read_head(folder, content)
    if config.changes_base and not residual_base:
        raise ConfigError(
            f"{config_path}: init_lora_weights: {config.init_lora_weights!r} took the adapter's start away "
            f"from the base; it belongs to that residual base, which is not in the file; {CONVERT}"
        )
    if not weights_path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        remedy = "save the adapter again with PEFT, which writes it" if pickled else "was the copy complete?"
        raise FileError(f"{folder}: has no {WEIGHTS_FILE}; {remedy}")
    file = SafetensorsFile(weights_path)
    try:
        parsed = parse_arrays(config, {key: file.tensor(key) for key in file.entries})
        return Adapter(config, parsed.pairs, parsed.tensors, parsed.tokens, head)
    except (FileError, TargetError, ShapeError, DTypeError, NonFiniteError) as error:
        raise type(error)(f"{weights_path}: {error}") from None
    except MemoryError:
        raise FileError(
            f"{weights_path}: expected an adapter that fits into memory, got {file.nbytes} bytes; is it one?"
        ) from None


def write_adapter(directory: str | os.PathLike[str], adapter: Adapter) -> None:
    """Write the adapter to a new folder, whole or not at all; equal adapters give equal bytes.

    Tensors have the names, shapes and order that PEFT gives them.

    Raises:
        FileError: ``directory`` exists and is not empty, or cannot be written.
        ConfigError: see `LoraConfig.to_json`.
    """
    with output_folder(directory) as folder:
        write_adapter_files(folder, adapter)


def write_adapter_files(folder: Path, adapter: Adapter) -> None:
    """Write the files of the adapter into an existing folder; for use inside ``output_folder``.

    Two are PEFT's. ``head.json`` is there where the adapter has a ``head``; PEFT leaves it alone.

    Raises:
        OSError: a file exists already or cannot be written.
        ConfigError: see `LoraConfig.to_json`.
    """
    text = json.dumps(adapter.config.to_json(), indent=2) + "\n"
    arrays = arrays_by_key(adapter.config, adapter.pairs, adapter.tensors, adapter.tokens)
    with (folder / CONFIG_FILE).open("x", encoding="utf-8") as file:
        file.write(text)
    write_safetensors(folder / WEIGHTS_FILE, arrays, {"format": "pt"})
    if adapter.head is not None:
        write_head(folder, adapter.head)
