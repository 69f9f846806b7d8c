"""Which tensor of the tuned checkpoint belongs to which of the base, and whether they differ."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loracle.files import Checkpoint
from loracle.files.architectures import architecture_of
from loracle.files.lora_pair import FLOATS
from loracle.files.tensor_names import TensorNames
from loracle.files.ties import tied_twin
from loracle.files.updates import same_bits
from loracle.reference import DTypeError, NonFiniteError, ShapeError, TargetError
from loracle.reference.formats import nonfinite_mask

BLOCK_ENTRIES = 1 << 22
"""How many entries of a tensor are widened to float64 at a time."""

_OTHER = "are both of one model?"
# what older versions of transformers wrote, and a model computes by itself
_COMPUTED = ("rotary_emb.inv_freq", ".masked_bias", "embeddings.position_ids")


@dataclass(frozen=True)
class TensorPair:
    """One tensor.

    Attributes:
        name: of the base.
        source: of the tuned checkpoint.
    """

    name: str
    source: str


def pair_tensors(base: Checkpoint, tuned: Checkpoint) -> tuple[TensorPair, ...]:
    """Return the tuned tensor of each of the base's, in the base's order; nothing is read.

    Names may have or lack the prefix of the model's body, or be of an older layout. Of embeddings that are
    one tensor, either checkpoint may hold one or both.

    Raises:
        TargetError: one checkpoint has a tensor that the other has not.
        ShapeError, DTypeError: a tensor has another shape there, or is a number of another kind.
    """
    names = TensorNames(tuned.names, architecture_of(tuned.config))
    pairs: list[TensorPair] = []
    for name in base.names:
        source = names.find(name) or tied_twin(name, tuned.names, tied=base.tied and tuned.tied)
        if source is None:
            if name.endswith(_COMPUTED):
                continue
            raise TargetError(f"{tuned.dir}: has no tensor {name}, which {base.dir} has; {_OTHER}")
        _check_alike(base, tuned, name, source)
        pairs.append(TensorPair(name, source))
    used = {pair.source for pair in pairs}
    for name in tuned.names:
        if name in used or name.endswith(_COMPUTED):
            continue
        twin = tied_twin(name, tuned.names, tied=tuned.tied)
        if twin is None or not same_bits(tuned.tensor(name), tuned.tensor(twin)):
            raise TargetError(f"{tuned.dir}: has a tensor {name}, which {base.dir} has not; {_OTHER}")
    return tuple(pairs)


def differs(base: Checkpoint, tuned: Checkpoint, pair: TensorPair) -> bool:
    """Tell whether the tensors have other values; of one dtype, other bits.

    Raises:
        NonFiniteError: one that differs has NaN or infinity.
    """
    one, other = base.tensor(pair.name), tuned.tensor(pair.source)
    if one.dtype == other.dtype:
        found = not same_bits(one, other)
    else:
        found = any((a != b).any() for a, b in blocks(one, other))
    if found and one.dtype in FLOATS:
        for name, tensor in ((pair.name, one), (f"tuned {pair.source}", other)):
            flat = tensor.reshape(-1)
            for start in range(0, flat.size, BLOCK_ENTRIES):
                if nonfinite_mask(flat[start : start + BLOCK_ENTRIES]).any():
                    raise NonFiniteError(f"{name}: expected finite numbers, got NaN or infinity; restore it")
    return found


def blocks(*arrays: NDArray[Any]) -> Iterator[tuple[NDArray[np.float64], ...]]:
    """Yield the same entries of arrays of one shape in float64, a bounded number at a time."""
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, BLOCK_ENTRIES):
        yield tuple(own[start : start + BLOCK_ENTRIES].astype(np.float64) for own in flat)


def row_slices(shape: tuple[int, ...] | torch.Size) -> Iterator[slice]:
    """Yield ranges of a matrix's rows, of a bounded number of entries each, unless one row has more."""
    step = max(1, BLOCK_ENTRIES // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def distance(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the Frobenius norm of the difference, in float64."""
    return float(np.sqrt(sum(float(np.square(b - a).sum()) for a, b in blocks(one, other))))


def _check_alike(base: Checkpoint, tuned: Checkpoint, name: str, source: str) -> None:
    if base.shape(name) != tuned.shape(source):
        raise ShapeError(
            f"{source}: expected {base.shape(name)} as the base's {name} has, got {tuned.shape(source)} in "
            f"{tuned.dir}; {_OTHER}"
        )
    one, other = base.dtype(name), tuned.dtype(source)
    if one != other and not (one in FLOATS and other in FLOATS):
        raise DTypeError(
            f"{source}: expected {one} as the base's {name} has, got {other}; use the checkpoints before "
            "quantisation"
        )
