"""Regular expressions that take for ever are told from those that do not, without being run."""

import re
import time

import pytest

from loracle.files.expression_cost import takes_too_long

PATH = "model.layers.11.self_attn.q_proj"

USUAL = (
    r".*q_proj",
    r".*\.(q_proj|k_proj|v_proj|o_proj)",
    r"^(?!.*vision).*(?:q_proj|v_proj)$",
    r"model\.layers\.\d+\.self_attn\.[qv]_proj",
    r".*\.layers\.(\d+)\..*\.(q|k)_proj",
    r"(\w+\.)*layers\.\d+\.(\w+\.)*q_proj",
    r"(?:[^.]+\.)+q_proj",
    r"model.*layers.*self_attn.*(q|k).*proj",
    r"(?i)MODEL.*Q_PROJ",
    r"(?:model\.)?layers\.[0-9]{1,2}\..*",
    r"(?P<a>model)\.(?P=a)?.*",
    r"(model)?(?(1)\..*|x)",
    r"(?>model)\..*",
    r".*+",
    r"a{1000}",
    r"[^\d\W]+\.",
    r"([A-Z]+[a-z])*$(?i:x)",
    r"(a+|b+)\.((?:c+)d)*",
    "",
)
ENDLESS = (
    r"(a+)+b",
    r"(a*)*b",
    r"(a|aa)+b",
    r"(.*)*x",
    r"(x+x+)+y",
    r"([a-z]+)*$",
    r"(a?){64}a{64}",
    r"(?:a{0,50}){0,50}",
    r".*.*.*.*.*.*.*.*x",
    r"(?=(a+)+b)a",
    r"(?!(a+)+b)a",
    r"(\w+\w)*x",
    r"(a|b|ab)*c",
    "([^\u0101b]+\u0103)*x",
    r"(?i:([a-z]+[A-Z])*)x",
)


@pytest.mark.parametrize("expression", USUAL)
def test_what_adapters_are_made_with_is_not_taken_for_endless(expression: str) -> None:
    re.compile(expression)
    assert not takes_too_long(expression, len(PATH))
    assert not takes_too_long(expression, 60)


@pytest.mark.parametrize("expression", ENDLESS)
def test_what_may_take_for_ever_is_told(expression: str) -> None:
    re.compile(expression)
    assert takes_too_long(expression, 60)


@pytest.mark.parametrize("expression", [*USUAL, *ENDLESS])
@pytest.mark.parametrize("letters", ["a", "x", "A", "a.", "aA", "1.", "ab"])
def test_what_is_not_taken_for_endless_ends_soon(expression: str, letters: str) -> None:
    """The texts on which such expressions are slow: much of one kind, and an end that fits not."""
    for length in (10, 30, 60, 90):
        text = (letters * length)[:length] + "!"
        if takes_too_long(expression, len(text)):
            return
        started = time.process_time()
        compiled = re.compile(expression)
        compiled.fullmatch(text)
        compiled.match(text)
        assert time.process_time() - started < 2


def test_a_repeat_that_ends_in_one_place_counts_once_whatever_group_it_is_in() -> None:
    assert not takes_too_long(r"(?:^|.*?\.)layers\.(?P<idx>\d+)\.", 5000)
    assert takes_too_long(r"(?:^|.*?\.)layers\.(?P<idx>\d+)[\d.]", 5000)


def test_the_longer_the_text_the_sooner_it_is_too_long() -> None:
    assert not takes_too_long(".*.*.*x", 100)
    assert takes_too_long(".*.*.*x", 1000)
    assert not takes_too_long(".*x", 100_000)
