"""A checkpoint with the adapter merged into it, written tensor by tensor into the layout of the base."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loracle.reference import DTypeError

from .adapter import FLOATS, read_adapter
from .atomic import output_folder
from .checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint
from .safetensors_writer import safetensors_header, write_array
from .sidecar import config_bytes, copy_sidecars, resized_tokenizer, sidecar_bytes
from .space import require_space
from .weights import MergedWeights

BLOCK_BYTES = 32 * 2**20
"""The most bytes of one tensor that are in memory at a time."""

Progress = Callable[[int, int], None]
"""Called with bytes written and bytes in all."""


@dataclass(frozen=True)
class MergedCheckpoint:
    """What was written.

    Attributes:
        dir: the new folder.
        merged_names: the tensors that the adapter changed or brought.
        tensors: how many tensors the checkpoint has.
        total_bytes: bytes of all tensors.
        files: the shards' names.
    """

    dir: Path
    merged_names: tuple[str, ...]
    tensors: int
    total_bytes: int
    files: tuple[str, ...]


def write_merged_checkpoint(
    model_dir: str | os.PathLike[str],
    adapter_dir: str | os.PathLike[str] | None,
    out_dir: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> MergedCheckpoint:
    """Write the model in ``model_dir`` with the adapter merged to ``out_dir``, whole or not at all.

    Shards, tensor names and their order are the base's; a tensor without a pair keeps its bytes.
    Configuration, tokenizer and chat template come along. A classifier's head that the adapter brings is
    added: names and ``config.json`` become those of the class with that head; see `MergedWeights`.

    Args:
        model_dir: the base model's folder.
        adapter_dir: the adapter's folder; None converts or copies the base alone.
        out_dir: absent or an empty folder.
        dtype: float16, bfloat16, float32 or float64 for all floating-point tensors; their own by default.
        threads: for each merge; one per CPU by default.
        progress: called after each block.

    Memory: a few blocks of ``BLOCK_BYTES`` and the adapter, whatever the model's size.

    Raises:
        LoracleError: whatever is wrong with the model, the adapter, their fit or the output; see
            ``Checkpoint``, ``read_adapter``, ``MergedWeights`` and ``output_folder``. Names, shapes and
            dtypes are checked before anything is written.
    """
    target = _target_dtype(dtype)
    with Checkpoint(model_dir) as checkpoint:
        adapter = None if adapter_dir is None else read_adapter(adapter_dir)
        weights = MergedWeights(checkpoint, adapter, threads=threads)
        plan = _Plan(checkpoint, weights, target)
        with output_folder(out_dir) as folder:
            require_space(folder.parent, plan.total_bytes + sidecar_bytes(checkpoint.dir))
            done = 0
            for shard in weights.shards:
                for written in _write_shard(folder / shard, plan, shard):
                    done += written
                    if progress is not None:
                        progress(done, plan.total_bytes)
            _write_descriptions(folder, plan, adapter_dir)
        return MergedCheckpoint(
            Path(out_dir),
            weights.merged_names,
            len(weights.names),
            plan.total_bytes,
            tuple(weights.shards),
        )


class _Plan:
    """Which dtype each tensor is written in."""

    def __init__(self, checkpoint: Checkpoint, weights: MergedWeights, target: np.dtype[Any] | None) -> None:
        self.checkpoint = checkpoint
        self.weights = weights
        self.target = target
        self.total_bytes = sum(
            math.prod(weights.shape(name)) * self.dtype(name).itemsize for name in weights.names
        )

    def dtype(self, name: str) -> np.dtype[Any]:
        own = self.weights.dtype(name)
        return self.target if self.target is not None and own in FLOATS else own

    def config(self) -> Mapping[str, Any]:
        config = self.weights.config
        if self.target is None:
            return config
        return {**config, **{key: str(self.target) for key in ("dtype", "torch_dtype") if key in config}}

    def order(self, shard: str) -> list[str]:
        names = list(self.weights.shards[shard])
        if self.target is not None or names != list(self.checkpoint.shards[shard]):
            # another layout could leave a wide tensor at an odd offset; the widest first keeps each aligned
            names.sort(key=lambda name: -self.dtype(name).itemsize)
        return names


def _target_dtype(dtype: DTypeLike | None) -> np.dtype[Any] | None:
    if dtype is None:
        return None
    target = np.dtype(dtype)
    if target not in FLOATS:
        known = ", ".join(str(known) for known in FLOATS)
        raise DTypeError(f"dtype: expected one of {known}, got {target}; choose one of them")
    return target


def _write_shard(path: Path, plan: _Plan, shard: str) -> Iterator[int]:
    """Write one file, and yield the bytes of each block written."""
    names = plan.order(shard)
    layout = [(name, plan.dtype(name), plan.weights.shape(name)) for name in names]
    with path.open("xb") as file:
        file.write(safetensors_header(layout, {"format": "pt", **plan.checkpoint.metadata(shard)}))
        for name in names:
            for block in _blocks(plan, name):
                write_array(file, block)
                plan.weights.release(name)
                yield block.nbytes


def _blocks(plan: _Plan, name: str) -> Iterator[NDArray[Any]]:
    """Yield the tensor's rows, at most ``BLOCK_BYTES`` at a time unless one row is longer."""
    shape, dtype = plan.weights.shape(name), plan.dtype(name)
    convert = dtype if dtype != plan.weights.dtype(name) else None
    if not shape:
        yield plan.weights.tensor(name, convert)
        return
    step = max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
    for start in range(0, shape[0], step):
        yield plan.weights.rows(name, start, min(start + step, shape[0]), convert)


def _write_descriptions(folder: Path, plan: _Plan, adapter_dir: str | os.PathLike[str] | None) -> None:
    checkpoint, config = plan.checkpoint, plan.config()
    copy_sidecars(
        checkpoint.dir,
        folder,
        exclude=() if config == checkpoint.config else (CONFIG_FILE,),
        tokenizer_dir=resized_tokenizer(adapter_dir, config, checkpoint.config),
    )
    if config != checkpoint.config:
        with (folder / CONFIG_FILE).open("xb") as file:
            file.write(config_bytes({**config}))
    if checkpoint.index is not None:
        metadata = checkpoint.index.get("metadata")
        kept = metadata if isinstance(metadata, dict) else {}
        index = {
            **checkpoint.index,
            "metadata": {**kept, "total_size": plan.total_bytes},
            "weight_map": {name: shard for shard, names in plan.weights.shards.items() for name in names},
        }
        with (folder / INDEX_FILE).open("xb") as file:
            file.write(config_bytes(index))
