"""A model folder in Hugging Face's layout: ``config.json`` and safetensors files, mapped into memory."""

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loracle.reference import FileError

from .contained import require_contained
from .json_file import read_json_object
from .mapped_view import MappedView
from .safetensors_file import SafetensorsFile

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
OUTPUT_EMBEDDINGS = ("lm_head", "embed_out")


class Tensors(Protocol):
    """A model's weights, one tensor at a time, as `Checkpoint` has them."""

    @property
    def dir(self) -> Path: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def shards(self) -> Mapping[str, tuple[str, ...]]: ...

    @property
    def tied(self) -> bool: ...

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype[Any]: ...

    def tensor(self, name: str) -> NDArray[Any]: ...

    def release(self, name: str) -> None: ...


class Checkpoint:
    """A model folder, opened for reading; a context manager.

    Attributes:
        dir: the folder.
        config: the content of ``config.json``.
        names: the tensors' names, in the order of the shards and of the bytes in each.
        shards: file name to tensor names, in the same order.
        index: the content of the index file, or None when there is a single file.

    Raises:
        FileError: the folder or ``config.json`` is missing, it holds no safetensors, or they are malformed or
            incomplete. File names in an index must be plain names of files in the folder: a link among them
            may lead to another of its files, or into the hub's cache, and nowhere else.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.dir = Path(directory)
        _require_model_folder(self.dir)
        self.config: Mapping[str, Any] = read_json_object(self.dir / CONFIG_FILE)
        self.index: Mapping[str, Any] | None = None
        weight_map: dict[str, str] | None = None
        shard_names = [SINGLE_FILE]
        if not (self.dir / SINGLE_FILE).exists():
            self.index = read_json_object(self.dir / INDEX_FILE)
            weight_map = _weight_map(self.index, self.dir / INDEX_FILE)
            shard_names = sorted(set(weight_map.values()))
            for name in shard_names:
                require_contained(self.dir, name)
        self._files = {name: SafetensorsFile(self.dir / name) for name in shard_names}
        self._home: dict[str, SafetensorsFile] = {}
        for file in self._files.values():
            for name in file.entries:
                if name in self._home:
                    other = self._home[name].path.name
                    raise FileError(f"{file.path}: {name} is in {other} too; save the checkpoint again")
                self._home[name] = file
        if weight_map is not None:
            _require_same(weight_map, self._home, self.dir / INDEX_FILE)
        self.names: tuple[str, ...] = tuple(self._home)
        self.shards: Mapping[str, tuple[str, ...]] = {
            name: tuple(file.entries) for name, file in self._files.items()
        }

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget the files. Arrays handed out stay valid; the last of them unmaps its file."""
        self._home = {}
        self._files = {}

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape."""
        return self._file(name).entries[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return the tensor's dtype as stored."""
        return self._file(name).entries[name].dtype

    def expect(self, name: str) -> None:
        """Have the system read the tensor ahead, in the background; it is asked for soon."""
        self._file(name).expect(name)

    def view(self, name: str) -> MappedView:
        """Return where the tensor lies."""
        return self._file(name).view(name)

    def tensor(self, name: str) -> NDArray[Any]:
        """Return the tensor: a read-only array over the mapped file, no copy."""
        return self._file(name).tensor(name)

    def release(self, name: str) -> None:
        """Let the system drop the tensor's pages from this process's memory; arrays handed out stay valid."""
        self._file(name).release(name)

    def place(self, name: str) -> tuple[str, int]:
        """Return the name of the tensor's shard, and the offset of its first byte in it."""
        file = self._file(name)
        return file.path.name, file.entries[name].offset

    def metadata(self, shard: str) -> Mapping[str, str]:
        """Return the ``__metadata__`` of one shard's header."""
        return self._files[shard].metadata

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self._home[name].entries[name].nbytes for name in self.names)

    @property
    def total_parameters(self) -> int:
        """Entries of all tensors; a tied tensor counts once."""
        return sum(math.prod(self.shape(name)) for name in self.names)

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings are one tensor; see `is_tied`."""
        return is_tied(self.config, self.names)

    def _file(self, name: str) -> SafetensorsFile:
        if not self._files:
            raise FileError(f"{self.dir}: the checkpoint is closed; read {name} inside its with block")
        if name not in self._home:
            raise FileError(f"{self.dir}: has no tensor {name}; is this the right model?")
        return self._home[name]


def is_tied(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Tell whether input and output embeddings are one tensor.

    As ``tie_word_embeddings`` in the configuration says; where it says nothing, because the value is the
    architecture's default, embeddings without an output layer beside them are tied.
    """
    flag = config.get("tie_word_embeddings")
    if isinstance(flag, bool):
        return flag
    has_input = any(is_module(name, INPUT_EMBEDDINGS) for name in names)
    has_output = any(is_module(name, OUTPUT_EMBEDDINGS) for name in names)
    return has_input and not has_output


def is_module(name: str, modules: tuple[str, ...]) -> bool:
    """Tell whether ``name`` is the weight of a module whose last component is among ``modules``."""
    *_, module, leaf = ("", *name.split("."))
    return leaf == "weight" and module in modules


def _require_model_folder(folder: Path) -> None:
    try:
        content = {entry.name for entry in folder.iterdir()}
    except NotADirectoryError:
        raise FileError(
            f"{folder}: expected a model folder, got a file; give the folder it lies in"
        ) from None
    except FileNotFoundError:
        raise FileError(f"{folder}: no such model folder; check the path") from None
    except OSError as error:
        raise FileError(f"{folder}: cannot be read ({error.strerror}); check the folder") from None
    if not content:
        raise FileError(f"{folder}: the model folder is empty; download the model into it")
    if CONFIG_FILE not in content:
        raise FileError(f"{folder}: has no {CONFIG_FILE}; give a model folder as transformers saves it")
    if SINGLE_FILE in content or INDEX_FILE in content:
        return
    if any(name.endswith(".safetensors") for name in content):
        raise FileError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}; is it a whole model?")
    if any(name.endswith((".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")) for name in content):
        raise FileError(
            f"{folder}: has no safetensors; convert it with transformers: "
            f"AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise FileError(f"{folder}: has no {SINGLE_FILE}; is the download complete?")


def _weight_map(index: Mapping[str, Any], source: Path) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{source}: expected a weight_map of tensor and file names; download it again")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not shard.startswith(".")
        if not plain or set(shard) & set("/\\\0"):
            raise FileError(
                f"{source}: {name} is said to be in {shard!r}, expected the plain name of a safetensors "
                f"file in the same folder; do not use this checkpoint"
            )
    return weight_map


def _require_same(weight_map: Mapping[str, str], home: Mapping[str, SafetensorsFile], source: Path) -> None:
    for name, shard in weight_map.items():
        if name not in home or home[name].path.name != shard:
            raise FileError(f"{source}: {name} is not in {shard}; download the checkpoint again")
    for name, file in home.items():
        if name not in weight_map:
            raise FileError(f"{source}: {name} in {file.path.name} is not listed; save the checkpoint again")
