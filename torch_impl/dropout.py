"""Dropout of an adapter's input: a mask that is drawn from a seed and can be drawn again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_STEPS = 2**16
"""Probabilities are multiples of one over this: a mask on the CPU takes 16 random bits an entry."""


@dataclass(frozen=True)
class SeededDropout:
    """Each entry is kept with probability ``1 - p``, and then multiplied by ``1 / (1 - p)``.

    The seed stands for the mask: `mask` gives the same one for the same shape, dtype and kind of device, so
    a backward pass draws it again instead of keeping it.
    """

    p: float
    seed: int

    @property
    def factor(self) -> float:
        """What kept entries are multiplied with, ``1 / (1 - p)``."""
        return 1.0 / (1.0 - self.p)

    def mask(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Return ones where an entry is kept and zeros elsewhere, in ``like``'s dtype and on its device."""
        if like.device.type == "cpu":
            # torch's own generator takes ten times as long for it, more than the products of the adapter.
            count = math.prod(shape)
            bits = np.random.SFC64(self.seed).random_raw(-(-count // 4)).view(np.uint16)[:count]
            kept = bits >= round(self.p * _STEPS)
            return torch.from_numpy(kept.view(np.uint8)).reshape(tuple(shape)).to(like.dtype)
        generator = torch.Generator(like.device).manual_seed(self.seed)
        return like.new_empty(shape).bernoulli_(1.0 - self.p, generator=generator)


def drawn_dropout(p: float) -> SeededDropout:
    """Return dropout with a seed from torch's global generator of the CPU, and p to the nearest 2^-16.

    So `torch.manual_seed` decides the masks, and recomputation under gradient checkpointing, which restores
    the generator, draws the same.
    """
    return SeededDropout(min(round(p * _STEPS), _STEPS - 1) / _STEPS, int(torch.randint(2**63 - 1, ())))


def multiplier(x: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Return 0 or ``1 / (1 - p)`` for each entry of x, drawn from torch's global generator."""
    keep = 1.0 - p
    return torch.empty_like(x, dtype=dtype, requires_grad=False).bernoulli_(keep).div_(keep)
