"""Tokens and labels: what is learned, where an example is cut, how a batch is padded."""

from typing import Any

import pytest
import torch
from torch_fixtures import byte_tokenizer

from loracle.reference import DataError
from loracle.torch_impl.batches import IGNORED, collate
from loracle.torch_impl.data import Completion, Conversation, Example, Text, Turn
from loracle.torch_impl.encoded import EncodingSettings
from loracle.torch_impl.encoding import Encoded, encode, encode_all, encode_causal


def pieces(tokenizer: Any, encoded: Encoded | None) -> list[tuple[str, bool]]:
    """The encoded text in runs, each with whether it is learned."""
    assert encoded is not None
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (token, IGNORED)
        learned = label != IGNORED
        if runs and runs[-1][1] == learned:
            runs[-1][0].append(token)
        else:
            runs.append(([token], learned))
    return [(tokenizer.decode(ids), learned) for ids, learned in runs]


CONVERSATION = Conversation(
    1, (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
)

FORMS: dict[str, tuple[Example, list[tuple[str, bool]]]] = {
    "completion": (Completion(1, None, "p", "c"), [("<user>p<eos>\n<assistant>", False), ("c<eos>", True)]),
    "system": (
        Completion(1, "s", "p", "c"),
        [("<system>s<eos>\n<user>p<eos>\n<assistant>", False), ("c<eos>", True)],
    ),
    "conversation": (
        CONVERSATION,
        [
            ("<user>a<eos>\n<assistant>", False),
            ("b<eos>", True),
            ("\n<user>c<eos>\n<assistant>", False),
            ("d<eos>", True),
        ],
    ),
    "a question without an answer is not kept": (
        Conversation(1, (*CONVERSATION.turns[:2], Turn("user", "c"))),
        [("<user>a<eos>\n<assistant>", False), ("b<eos>", True)],
    ),
    "text": (Text(1, "t"), [("t<eos>", True)]),
}


@pytest.mark.parametrize("name", FORMS)
def test_only_what_the_assistant_says_is_learned(name: str) -> None:
    tokenizer = byte_tokenizer()
    example, expected = FORMS[name]
    assert pieces(tokenizer, encode(tokenizer, example, 100)) == expected


def test_without_a_template_prompt_and_completion_are_joined() -> None:
    tokenizer = byte_tokenizer(template=None)
    assert pieces(tokenizer, encode(tokenizer, Completion(1, None, "p", "c"), 100)) == [
        ("p", False),
        ("c<eos>", True),
    ]


@pytest.mark.parametrize("example", [Completion(7, "s", "p", "c"), Conversation(7, CONVERSATION.turns)])
def test_what_needs_a_template_says_so(example: Example) -> None:
    with pytest.raises(DataError, match=r"line 7: .*chat template"):
        encode(byte_tokenizer(template=None), example, 100)


def test_a_message_names_the_file_where_it_is_known() -> None:
    settings = EncodingSettings(100, "d.jsonl")
    with pytest.raises(DataError, match=r"^d\.jsonl, line 7: messages: expected a tokenizer with a chat"):
        encode_causal(byte_tokenizer(template=None), [Conversation(7, CONVERSATION.turns)], settings)
    with pytest.raises(DataError, match=r"^d\.jsonl: expected prompts and completions of at most"):
        encode_causal(byte_tokenizer(template=None), [Text(7, "x")], EncodingSettings(1, "d.jsonl"))


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"line 7: .*rewrites earlier turns"):
        encode(byte_tokenizer(rewriting), Conversation(7, CONVERSATION.turns), 100)


def test_an_error_of_the_template_is_passed_on_with_the_line() -> None:
    refusing = "{{ raise_exception('users first') }}"
    with pytest.raises(DataError, match=r"line 7: .*users first"):
        encode(byte_tokenizer(refusing), Completion(7, None, "p", "c"), 100)


def test_a_long_prompt_loses_its_end_and_the_completion_stays_whole() -> None:
    tokenizer = byte_tokenizer()
    example = Completion(1, None, "0123456789", "yes")
    whole = encode(tokenizer, example, 100)
    assert whole is not None
    assert not whole.shortened
    length = len(whole.input_ids)
    assert encode(tokenizer, example, length) == whole
    cut = encode(tokenizer, example, length - 4)
    assert cut is not None
    assert cut.shortened
    assert len(cut.input_ids) == length - 4
    assert pieces(tokenizer, cut) == [("<user>012345<eos>\n<assistant>", False), ("yes<eos>", True)]
    assert encode(tokenizer, example, length - 9) is not None
    assert encode(tokenizer, example, length - 10) is None


def test_a_cut_through_a_character_drops_the_character() -> None:
    tokenizer = byte_tokenizer()
    example = Completion(
        1, None, "ab\u20ac", "yes"
    )  # three bytes: a cut of one or two leaves an incomplete one
    length = len(encode(tokenizer, example, 100).input_ids)  # type: ignore[union-attr]
    for excess in (1, 2, 3):
        assert (
            pieces(tokenizer, encode(tokenizer, example, length - excess))[0][0]
            == "<user>ab<eos>\n<assistant>"
        )


def test_texts_and_conversations_lose_their_end() -> None:
    tokenizer = byte_tokenizer()
    cut = encode(tokenizer, Text(1, "0123456789"), 4)
    assert pieces(tokenizer, cut) == [("0123", True)]
    assert cut is not None
    assert cut.shortened
    conversation = encode(tokenizer, CONVERSATION, 8)
    assert pieces(tokenizer, conversation) == [
        ("<user>a<eos>\n<assistant>", False),
        ("b<eos>", True),
        ("\n", False),
    ]
    assert encode(tokenizer, CONVERSATION, 5) is None


def test_the_first_token_is_never_predicted() -> None:
    assert Encoded((5, 6, 7), (5, 6, IGNORED)).learned == 1
    assert encode(byte_tokenizer(template=None), Text(1, "x"), 1) is None


def test_encode_all_counts_what_it_changed_and_left_out() -> None:
    tokenizer = byte_tokenizer()
    examples = [Completion(1, None, prompt, "c") for prompt in ("abc", "abcdefgh", "")]
    examples.append(Completion(4, None, "a", "c" * 50))
    data = encode_all(tokenizer, examples, 10)
    assert (len(data.examples), data.shortened, data.left_out) == (3, 1, 1)
    with pytest.raises(DataError, match=r"max_length 3 .*4 examples of which none fits"):
        encode_all(tokenizer, examples, 3)


def test_collate_pads_on_the_right_to_the_longest() -> None:
    nine = Encoded(tuple(range(1, 10)), (IGNORED, *range(2, 10)))
    two = Encoded((7, 8), (IGNORED, 8))
    batch = collate([nine, two])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, 9)
    )
    assert batch["input_ids"][1].tolist() == [7, 8] + [0] * 7
    assert batch["attention_mask"].sum(dim=1).tolist() == [9, 2]
    assert batch["attention_mask"][1, :2].tolist() == [1, 1]
    assert batch["labels"].tolist() == [[IGNORED, *range(2, 10)], [IGNORED, 8, *[IGNORED] * 7]]
    assert all(tensor.dtype is torch.int64 for tensor in batch.values())
