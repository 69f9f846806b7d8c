"""An adapter's pairs as the matrices that they multiply: one for a weight, one each for stacked experts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.reference import ConfigError, expert_factors_from_peft, round_to

from .adapter import Adapter
from .lora_pair import LoraPair


@dataclass(frozen=True, eq=False)
class PairMatrices:
    """``delta = scaling * B @ A`` of one weight.

    Attributes:
        name: the module's path, with the number of the expert for one of several.
        A: (r, in); of an embedding (r, V), of a convolution each kernel's taps in one row.
        B: (out, r).
        scaling: of the pair.
    """

    name: str
    A: NDArray[Any]
    B: NDArray[Any]
    scaling: float

    @property
    def r(self) -> int:
        """The rank."""
        return int(self.A.shape[0])


def matrices_of(adapter: Adapter, path: str) -> tuple[PairMatrices, ...]:
    """Return the matrices of one pair.

    Raises:
        ConfigError: how many experts share the pair's rows depends on a pattern of the configuration, and the
            name that it is for is not in the file.
    """
    pair, config = adapter.pairs[path], adapter.config
    if pair.kind != "parameter":
        return split(path, pair, 1)
    if not config.targets_parameter(path) and (config.rank_pattern or config.alpha_pattern):
        raise ConfigError(
            f"{path}: a stacked parameter without its name, whose rank and scaling rank_pattern and "
            "alpha_pattern may give; name it with loracle.files.name_parameters"
        )
    return split(path, pair, pair.r // config.rank_of(path))


def split(path: str, pair: LoraPair, experts: int) -> tuple[PairMatrices, ...]:
    """Return the matrices of a pair for ``experts`` weights, which is 1 unless they are stacked."""
    if pair.kind == "parameter":
        As, Bs = expert_factors_from_peft(pair.A, pair.B, experts)
        names = (f"{path}[{expert}]" for expert in range(experts))
        return tuple(PairMatrices(*own, pair.scaling) for own in zip(names, As, Bs, strict=True))
    rows = len(pair.A)
    return (PairMatrices(path, pair.A.reshape(rows, -1), pair.B.reshape(-1, rows), pair.scaling),)


def joined(pair: LoraPair, matrices: Sequence[PairMatrices]) -> LoraPair:
    """Return the pair with other factors, of one rank, rounded to the dtypes of its own, in their shapes.

    Args:
        pair: that `split` gave as many matrices of. Its bias of lora_B keeps what it adds.
        matrices: with the scaling that the pair is to have, not 0 unless the pair's is.
    """
    first = matrices[0]
    if pair.kind == "parameter":
        A = np.concatenate([own.A for own in matrices])
        B = np.stack([own.B for own in matrices]).transpose(1, 2, 0).reshape(len(first.B), -1)
    else:
        A = first.A.reshape(first.r, *pair.A.shape[1:])
        B = first.B.reshape(len(first.B), first.r, *pair.B.shape[2:])
    bias = pair.bias
    if bias is not None and first.scaling != pair.scaling:
        bias = round_to(bias.astype(np.float64) * (pair.scaling / first.scaling), bias.dtype)
    return replace(
        pair,
        A=np.ascontiguousarray(round_to(A, pair.A.dtype)),
        B=np.ascontiguousarray(round_to(B, pair.B.dtype)),
        scaling=first.scaling,
        bias=bias,
    )
