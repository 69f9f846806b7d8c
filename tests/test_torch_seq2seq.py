"""Sources and targets: what is cut, what is left out, what is refused."""

from refusal import refused
from task_fixtures import ids_of, word_tokenizer

from loracle.reference import DataError
from loracle.torch_impl.data import Completion
from loracle.torch_impl.encoded import EncodingSettings
from loracle.torch_impl.seq2seq import TranslatedRow, encode_translated


def test_source_and_target_have_special_tokens_of_their_own() -> None:
    data = encode_translated(word_tokenizer(), [Completion(1, None, "ab", "c")], EncodingSettings(9))
    (row,) = data.examples
    assert row == TranslatedRow(ids_of("[CLS]", "a", "##b", "[SEP]"), ids_of("[CLS]", "c", "[SEP]"))
    assert row.learned == 3


def test_a_source_loses_its_end_and_a_long_target_is_left_out() -> None:
    examples = [Completion(1, None, "abcdef", "ab"), Completion(2, None, "a", "abc")]
    data = encode_translated(word_tokenizer(), examples, EncodingSettings(4, "d"))
    assert data.examples == (
        TranslatedRow(ids_of("[CLS]", "a", "##b", "[SEP]"), ids_of("[CLS]", "a", "##b", "[SEP]"), True),
    )
    assert (data.shortened, data.left_out) == (1, 1)
    refused(
        lambda: encode_translated(word_tokenizer(), examples, EncodingSettings(3, "d")),
        DataError,
        "d: expected completions of at most max_length 3 tokens, got 2 examples of which none fits; "
        "raise max_length",
    )


class TwoSided:
    """A tokenizer that marks sources and targets apart, as translation models' do."""

    def __call__(self, text: str | None = None, *, text_target: str | None = None) -> dict[str, list[int]]:
        source = text is not None
        return {"input_ids": [1 if source else 2, *range(10, 10 + len(text or text_target or ""))]}


def test_a_target_is_tokenized_as_one() -> None:
    data = encode_translated(TwoSided(), [Completion(1, None, "abc", "d")], EncodingSettings(9))
    assert data.examples == (TranslatedRow((1, 10, 11, 12), (2, 10)),)


def test_a_system_instruction_has_no_place() -> None:
    refused(
        lambda: encode_translated(word_tokenizer(), [Completion(4, "s", "a", "b")], EncodingSettings(9, "d")),
        DataError,
        "d, line 4: system: expected none for a model with an encoder, got one; "
        "put the instruction into the prompt",
    )
