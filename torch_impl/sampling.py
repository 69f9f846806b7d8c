"""The order of training: batches of similar length, shuffled, the same for the same seed and epoch."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

_POOL = 16
"""Batches' worth of examples that are sorted together: the more, the less padding and the less chance."""


class LengthGroupedSampler(Sampler[int]):
    """Yield every index once an epoch so that ``batch_size`` consecutive ones have similar lengths.

    The indices are permuted, sorted by length within pools of `_POOL` batches, cut into batches, and the
    batches permuted. The order is a function of ``seed`` and the epoch alone, not of torch's global
    generator: a run that is resumed within an epoch sees the same batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = tuple(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, whose order comes next; the training loop calls this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self._seed, self._epoch))
        permuted: list[int] = generator.permutation(len(self)).tolist()
        pool = _POOL * self._batch_size
        batches: list[list[int]] = []
        for start in range(0, len(permuted), pool):
            by_length = sorted(permuted[start : start + pool], key=lambda index: self._lengths[index])
            batches += [
                by_length[at : at + self._batch_size] for at in range(0, len(by_length), self._batch_size)
            ]
        # The last batch may be short, and must stay last: batches are cut out of the sequence by counting.
        order: list[int] = [*generator.permutation(len(batches) - 1).tolist(), len(batches) - 1]
        return iter([index for at in order for index in batches[at]])


class EpochSampler(Sampler[tuple[int, int]]):
    """Yield (epoch, index) for each index of another order: for rows that differ from epoch to epoch."""

    def __init__(self, order: LengthGroupedSampler) -> None:
        self._order = order
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that comes next; the training loop calls this."""
        self._epoch = epoch
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(self._epoch, index) for index in self._order])
