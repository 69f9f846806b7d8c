"""The order of training: each example once an epoch, similar lengths together, fixed by seed and epoch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.torch_impl.sampling import EpochSampler, LengthGroupedSampler


def order(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    sampler = LengthGroupedSampler(lengths, batch_size, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=300),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 3),
)
def test_each_index_once(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    indices = order(lengths, batch_size, seed, epoch)
    assert sorted(indices) == list(range(len(lengths)))
    assert indices == order(lengths, batch_size, seed, epoch)


def test_batches_of_one_pool_do_not_overlap_in_length() -> None:
    lengths = [(37 * i) % 101 for i in range(64)]  # 64 different lengths: 16 batches of 4, one pool
    indices = order(lengths, 4, 0, 0)
    batches = [sorted(lengths[i] for i in indices[at : at + 4]) for at in range(0, 64, 4)]
    by_length = sorted(batches)
    assert [length for lengths_ in by_length for length in lengths_] == sorted(lengths)
    assert batches != by_length
    assert batches != by_length[::-1]


def test_the_short_batch_comes_last() -> None:
    lengths = list(range(10))
    for seed in range(5):
        indices = order(lengths, 4, seed, 0)
        full = [sorted(indices[:4]), sorted(indices[4:8])]
        assert sorted(full) == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert sorted(indices[8:]) == [8, 9]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0)])
def test_seeds_and_epochs_differ(seed: int, epoch: int) -> None:
    lengths = [1] * 50
    assert order(lengths, 4, seed, epoch) != order(lengths, 4, 0, 0)
    assert order(lengths, 4, 0, 1) != order(lengths, 4, 1, 0)


def test_draws_tell_their_epoch_and_keep_the_order() -> None:
    lengths = [(37 * i) % 101 for i in range(64)]
    draws = EpochSampler(LengthGroupedSampler(lengths, 4, 5))
    assert len(draws) == 64
    for epoch in (0, 3, 1):
        draws.set_epoch(epoch)
        assert list(draws) == [(epoch, index) for index in order(lengths, 4, 5, epoch)]
