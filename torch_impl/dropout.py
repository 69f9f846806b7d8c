"""Dropout of an adapter's input: a mask that is drawn from a seed and can be drawn again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
        generator = torch.Generator(like.device).manual_seed(self.seed)
        return like.new_empty(shape).bernoulli_(1.0 - self.p, generator=generator)


def drawn_dropout(p: float) -> SeededDropout:
    """Return dropout with a seed from torch's global generator of the CPU.

    So `torch.manual_seed` decides the masks, and recomputation under gradient checkpointing, which restores
    the generator, draws the same.
    """
    return SeededDropout(p, int(torch.randint(2**63 - 1, ())))


def multiplier(x: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Return 0 or ``1 / (1 - p)`` for each entry of x, drawn from torch's global generator."""
    keep = 1.0 - p
    return torch.empty_like(x, dtype=dtype, requires_grad=False).bernoulli_(keep).div_(keep)
