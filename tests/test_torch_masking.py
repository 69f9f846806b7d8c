"""Hidden tokens: which, how many, what they become, and that seed, epoch and index alone decide."""

import math

import numpy as np
import pytest
from refusal import refused
from task_fixtures import ids_of, word_tokenizer
from torch_fixtures import byte_tokenizer

from loracle.reference import ConfigError, DataError
from loracle.torch_impl.batches import IGNORED
from loracle.torch_impl.data import Text
from loracle.torch_impl.encoded import EncodingSettings
from loracle.torch_impl.masking import MaskableRow, MaskedRows, Masking, encode_maskable

MASK = 4


def masking(probability: float = 0.15, seed: int = 0) -> Masking:
    return Masking.of(word_tokenizer(), probability, seed)


def row(length: int, first: int = 5) -> MaskableRow:
    """[CLS], ``length`` tokens of which none is another's, as far as there are, and [SEP]."""
    ids = tuple(first + at % 70 for at in range(length))
    return MaskableRow((2, *ids, 3), (False, *[True] * length, False))


def within(count: int, of: int, share: float) -> bool:
    """Whether a binomial count lies within six standard deviations of its mean."""
    return abs(count - of * share) <= 6 * math.sqrt(of * share * (1 - share))


def test_a_share_is_chosen_and_eight_tenths_of_it_hidden() -> None:
    whole = row(50_000)
    for probability in (0.15, 0.4):
        hidden = masking(probability).hide(whole, 0)
        ids, new, labels = (np.array(x) for x in (whole.input_ids, hidden.input_ids, hidden.labels))
        chosen = labels != IGNORED
        count = int(chosen.sum())
        assert within(count, 50_000, probability)
        assert hidden.learned == count
        assert (labels[chosen] == ids[chosen]).all()
        assert (new[~chosen] == ids[~chosen]).all()
        masked, same = int((new[chosen] == MASK).sum()), int((new[chosen] == ids[chosen]).sum())
        ordinary = len(word_tokenizer()) - 5
        assert within(masked, count, 0.8)
        assert within(same, count, 0.1 + 0.1 / ordinary)
        drawn = new[chosen & (new != MASK) & (new != ids)]
        assert drawn.min() >= 5  # no special token
        assert len(set(drawn.tolist())) == ordinary


def test_special_tokens_are_never_hidden() -> None:
    for index in range(50):
        hidden = masking(0.99).hide(row(3), index)
        assert (hidden.input_ids[0], hidden.input_ids[-1]) == (2, 3)
        assert (hidden.labels[0], hidden.labels[-1]) == (IGNORED, IGNORED)


def test_one_token_is_chosen_where_chance_chooses_none() -> None:
    places = set()
    for index in range(60):
        hidden = masking(1e-12).hide(row(3), index)
        (place,) = (at for at, label in enumerate(hidden.labels) if label != IGNORED)
        places.add(place)
    assert places == {1, 2, 3}


def test_seed_epoch_and_index_alone_decide() -> None:
    rows = [row(40), row(40), row(30)]
    one, again = MaskedRows(rows, masking()), MaskedRows(rows, masking())
    draws = [(epoch, index) for epoch in range(3) for index in range(3)]
    forward = {draw: one[draw] for draw in draws}
    backward = {draw: again[draw] for draw in reversed(draws)}
    assert forward == backward
    assert len(one) == 3
    # The first two rows are equal, so what differs is the choice.
    other = MaskedRows(rows, masking(seed=1))
    seen = [forward[(0, 0)], forward[(0, 1)], forward[(1, 0)], forward[(1, 1)], other[(0, 0)]]
    held = list(one.held_out())
    assert held == list(again.held_out())
    assert len({hidden.labels for hidden in [*seen, *held[:2]]}) == 7


def test_texts_are_encoded_with_special_tokens_and_cut() -> None:
    settings = EncodingSettings(5, "d")
    data = encode_maskable(word_tokenizer(), [Text(1, "ab €"), Text(2, "abcdef"), Text(3, "€")], settings)
    assert data.examples == (
        MaskableRow(ids_of("[CLS]", "a", "##b", "[UNK]", "[SEP]"), (False, True, True, False, False)),
        MaskableRow(ids_of("[CLS]", "a", "##b", "##c", "[SEP]"), (False, True, True, True, False), True),
    )
    assert (data.shortened, data.left_out) == (1, 1)  # a text of unknown characters teaches nothing
    refused(
        lambda: encode_maskable(word_tokenizer(), [Text(1, "ab")], EncodingSettings(2, "d")),
        DataError,
        "d: expected texts of at most max_length 2 tokens, got 1 examples of which none fits; "
        "raise max_length",
    )


def test_nothing_is_hidden_before_it_is_drawn() -> None:
    assert row(2).columns() == {"input_ids": (2, 5, 6, 3), "labels": (IGNORED,) * 4}
    assert row(2).learned == 2


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a tokenizer with a mask token for masked-lm"):
        Masking.of(byte_tokenizer(), 0.15, 0)
