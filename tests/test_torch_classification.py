"""Labelled texts and tagged words as tokens: what is learned, what is cut, what is refused."""

from typing import Any

import pytest
from refusal import refused
from task_fixtures import ids_of, word_tokenizer
from tokenizers import Regex, pre_tokenizers
from torch_fixtures import byte_tokenizer

from loracle.reference import DataError
from loracle.torch_impl.batches import IGNORED
from loracle.torch_impl.classification import LabelledRow, TaggedRow, encode_labelled, encode_tagged
from loracle.torch_impl.data import Labelled, Tagged
from loracle.torch_impl.encoded import EncodingSettings
from loracle.torch_impl.labels import Labels

NAMES = Labels(("no", "yes"))


def settings(max_length: int = 32, **options: Any) -> EncodingSettings:
    return EncodingSettings(max_length, "d.jsonl", NAMES, **options)


def test_a_text_and_a_pair_are_joined_as_the_tokenizer_does() -> None:
    examples = [Labelled(1, "ab", None, "yes"), Labelled(2, "a", "bc", "no")]
    single = ids_of("[CLS]", "a", "##b", "[SEP]")
    pair = ids_of("[CLS]", "a", "[SEP]", "b", "##c", "[SEP]")
    assert encode_labelled(word_tokenizer(), examples, settings()).examples == (
        LabelledRow(single, 1),
        LabelledRow(pair, 0),
    )
    assert encode_labelled(word_tokenizer(), examples, settings(token_types=True)).examples == (
        LabelledRow(single, 1, (0, 0, 0, 0)),
        LabelledRow(pair, 0, (0, 0, 0, 1, 1, 1)),
    )


def test_the_longer_text_of_a_pair_loses_its_end() -> None:
    examples = [
        Labelled(1, "abcdef", "gh", "yes"),
        Labelled(2, "abcd", None, "no"),
        Labelled(3, "a", "b", "no"),
    ]
    data = encode_labelled(word_tokenizer(), examples, settings(7))
    assert data.examples == (
        LabelledRow(ids_of("[CLS]", "a", "##b", "[SEP]", "g", "##h", "[SEP]"), 1, None, True),
        LabelledRow(ids_of("[CLS]", "a", "##b", "##c", "##d", "[SEP]"), 0),
        LabelledRow(ids_of("[CLS]", "a", "[SEP]", "b", "[SEP]"), 0),
    )
    assert (data.shortened, data.left_out) == (1, 0)
    assert sum(one.learned for one in data.examples) == 3


def test_an_unknown_class_names_file_and_line() -> None:
    refused(
        lambda: encode_labelled(word_tokenizer(), [Labelled(7, "a", None, "maybe")], settings()),
        DataError,
        "d.jsonl, line 7: label: expected one of the classes 'no', 'yes', got 'maybe'; "
        "only classes of the training data can be told apart",
    )
    refused(
        lambda: encode_tagged(word_tokenizer(), [Tagged(7, ("a", "b"), ("no", 3))], settings()),
        DataError,
        "d.jsonl, line 7: tags[1]: expected one of the classes 'no', 'yes', got '3'; "
        "only classes of the training data can be told apart",
    )


def test_a_words_class_is_at_its_first_token() -> None:
    data = encode_tagged(
        word_tokenizer(), [Tagged(1, ("cab", "b", "b", "ab"), ("yes", "no", "yes", "no"))], settings()
    )
    (row,) = data.examples
    assert row == TaggedRow(
        ids_of("[CLS]", "c", "##a", "##b", "b", "b", "a", "##b", "[SEP]"),
        (IGNORED, 1, IGNORED, IGNORED, 0, 1, 0, IGNORED, IGNORED),
    )
    assert row.learned == 4


def test_a_word_of_no_token_is_not_learned_and_the_last_words_are_cut() -> None:
    examples = [
        Tagged(1, ("a", "\u0000", "bc"), ("yes", "yes", "no")),
        Tagged(2, ("abc", "d"), ("no", "yes")),
    ]
    data = encode_tagged(word_tokenizer(), examples, settings(5))
    assert data.examples == (
        TaggedRow(ids_of("[CLS]", "a", "b", "##c", "[SEP]"), (IGNORED, 1, 0, IGNORED, IGNORED)),
        TaggedRow(ids_of("[CLS]", "a", "##b", "##c", "[SEP]"), (IGNORED, 0, IGNORED, IGNORED, IGNORED), True),
    )
    refused(
        lambda: encode_tagged(word_tokenizer(), examples, settings(2)),
        DataError,
        "d.jsonl: expected tagged words of at most max_length 2 tokens, got 2 examples of which none fits; "
        "raise max_length",
    )


@pytest.mark.parametrize("split", [False, True])
def test_byte_level_words_are_read_behind_a_space(split: bool) -> None:
    """As with ``add_prefix_space``; a pattern that splits before the bytes must not add spaces of its own."""
    tokenizer = byte_tokenizer()
    if split:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"'t| ?[a-z]+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    (row,) = encode_tagged(tokenizer, [Tagged(1, ("don't", "b"), ("no", "yes"))], settings()).examples
    assert tokenizer.decode(list(row.input_ids)) == " don't b"
    assert row.columns()["labels"] == (0, *[IGNORED] * 5, 1, IGNORED)
    prefixing = byte_tokenizer()
    prefixing.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    (same,) = encode_tagged(prefixing, [Tagged(1, ("don't", "b"), ("no", "yes"))], settings()).examples
    assert same == row  # no second space
    (plain,) = encode_tagged(word_tokenizer(), [Tagged(1, ("b",), ("no",))], settings()).examples
    assert plain.input_ids == ids_of("[CLS]", "b", "[SEP]")


class Slow:
    """A tokenizer that does not know words."""

    is_fast = False


def test_a_tokenizer_that_knows_no_words_is_refused() -> None:
    refused(
        lambda: encode_tagged(Slow(), [Tagged(1, ("a",), ("no",))], settings()),
        DataError,
        "d.jsonl: expected a fast tokenizer, which tells the word of each token, got Slow; "
        "give the model's folder a tokenizer.json",
    )
