"""Text as its tokens arrive: whole characters, nothing of a stop string, no more held back than needed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loracle.export.streaming import AnswerText, Detokenizer, StopFilter
from loracle.reference import ConfigError

REPLACEMENT = "\ufffd"
SPECIAL = 256


def byte_tokenizer() -> Tokenizer:
    """A token for every byte, and a special one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens([AddedToken("<tool>")])
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """As Llama 2's: words begin with a mark, the first loses its space, unknown characters are bytes."""
    words = ["<unk>", "▁Hello", "▁world", "lo", "▁", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return tokenizer


def wordpiece_tokenizer() -> Tokenizer:
    words = ["[UNK]", "hello", "##lo", "world", ".", "don", "'", "t"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


BYTES = byte_tokenizer()
SENTENCEPIECE = sentencepiece_tokenizer()
WORDPIECE = wordpiece_tokenizer()


def pieces_of(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(token) for token in tokens]


@given(st.lists(st.integers(0, SPECIAL + 1), max_size=40))
def test_pieces_join_to_the_text_whatever_the_bytes(tokens: list[int]) -> None:
    """All but the bytes at the end that are no whole character."""
    whole = BYTES.decode(tokens, skip_special_tokens=True)
    assert "".join(pieces_of(BYTES, tokens)) == whole.rstrip(REPLACEMENT)


@given(st.text(st.characters(exclude_characters=REPLACEMENT, exclude_categories=["Cs"]), max_size=12))
def test_a_character_comes_with_its_last_byte_and_not_before(text: str) -> None:
    tokens = BYTES.encode(text, add_special_tokens=False).ids
    sizes = [len(character.encode()) for character in text]
    expected = [
        piece
        for character, size in zip(text, sizes, strict=True)
        for piece in [""] * (size - 1) + [character]
    ]
    assert pieces_of(BYTES, tokens) == expected


@given(st.lists(st.sampled_from(["▁Hello", "▁world", "lo", "!", "é", "👍"]), max_size=12))
def test_pieces_join_to_the_text_where_the_first_token_is_decoded_in_a_way_of_its_own(
    words: list[str],
) -> None:
    tokens = []
    for word in words:
        known = SENTENCEPIECE.token_to_id(word)
        names = [f"<0x{byte:02X}>" for byte in word.encode()]
        tokens += [known] if known is not None else [SENTENCEPIECE.token_to_id(name) for name in names]
    pieces = pieces_of(SENTENCEPIECE, tokens)
    assert "".join(pieces) == SENTENCEPIECE.decode(tokens)
    assert REPLACEMENT not in "".join(pieces)


@given(st.lists(st.integers(1, 7), max_size=20))
def test_pieces_of_words_join_to_the_text(tokens: list[int]) -> None:
    assert "".join(pieces_of(WORDPIECE, tokens)) == WORDPIECE.decode(tokens)


def test_a_special_token_neither_shows_nor_comes_between_words() -> None:
    tokenizer = sentencepiece_tokenizer()
    tokenizer.add_special_tokens(["</s>"])
    end = tokenizer.token_to_id("</s>")
    assert pieces_of(tokenizer, [1, end, 2, end]) == ["Hello", "", " world", ""]
    assert pieces_of(BYTES, [SPECIAL + 1]) == ["<tool>"]


def test_the_time_of_a_token_does_not_grow_with_the_text() -> None:
    """What is decoded at a token is the piece before and what follows it."""
    decoded: list[int] = []

    class Counting:
        get_added_tokens_decoder = BYTES.get_added_tokens_decoder

        def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
            decoded.append(len(tokens))
            return str(BYTES.decode(tokens, skip_special_tokens=skip_special_tokens))

    detokenizer = Detokenizer(Counting())  # type: ignore[arg-type]
    for token in BYTES.encode("a👍" * 50).ids:
        detokenizer.push(token)
    assert max(decoded) == 5  # the letter before, and four bytes


texts = st.text("ab", max_size=24)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def cut(text: str, stops: list[str]) -> str:
    """What is before the stop string that is complete first (the longest of those), by single characters."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@given(texts, stop_lists, st.lists(st.integers(0, 24), max_size=6))
def test_what_comes_before_a_stop_string_comes_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    ends = sorted({min(place, len(text)) for place in cuts} | {len(text)})
    stream = StopFilter(stops)
    shown_text = cut(text, stops)
    shown = start = 0
    for end in ends:
        piece = stream.push(text[start:end])
        assert shown_text[shown : shown + len(piece)] == piece
        shown, start = shown + len(piece), end
        held = text[shown:end]
        if stream.found:
            assert shown == len(shown_text)
            assert stream.push("ab") == stream.close() == ""
            return
        # No more is held back than may become a stop string.
        assert not held or any(len(held) < len(stop) and stop.startswith(held) for stop in stops)
        # And no less: nothing that was shown may begin one.
        for stop in stops:
            for size in range(1, len(stop)):
                if text[:end].endswith(stop[:size]):
                    assert len(cut(text[:end] + stop[size:], stops)) >= shown
    assert text[:shown] + stream.close() == cut(text, stops) == text


def test_a_stop_string_may_lie_across_tokens_and_inside_a_characters_bytes() -> None:
    answer = AnswerText(BYTES, ["é👍", "</end>"])
    shown = [answer.push(token) for token in BYTES.encode("oké👎é👍rest").ids]
    assert "".join(shown) == answer.text == "oké👎"
    assert answer.stopped
    assert answer.close() == ""
    # The é alone may be the beginning: it waits for the next character, which is whole after four bytes.
    assert shown[:8] == ["o", "k", "", "", "", "", "", "é👎"]


def test_what_was_held_back_is_text_when_the_answer_ends() -> None:
    answer = AnswerText(BYTES, ["</end>"])
    shown = [answer.push(token) for token in BYTES.encode("a </en").ids]
    assert shown == ["a", " ", "", "", "", ""]
    assert answer.close() == "</en"
    assert answer.text == "a </en"
    assert not answer.stopped
    assert answer.tokens == BYTES.encode("a </en").ids


def test_half_a_character_at_the_end_is_dropped() -> None:
    answer = AnswerText(BYTES)
    tokens = BYTES.encode("n👍").ids[:-1]
    assert "".join(map(answer.push, tokens)) + answer.close() == "n"


@pytest.mark.parametrize("stops", [[""], ["a", ""]])
def test_an_empty_stop_string_is_refused(stops: list[str]) -> None:
    refused(lambda: StopFilter(stops), ConfigError, "stop: expected some text, got an empty string")
