"""What a user writes as settings and methods, and what is refused."""

import pytest

from loracle.export.bench.methods import METHODS
from loracle.export.bench.settings import (
    Effort,
    Setting,
    check_context,
    parse_methods,
    parse_settings,
)
from loracle.reference import ConfigError

MEDIUM = 354_823_168


def test_a_setting_has_its_own_budget_or_the_paper_s_share() -> None:
    first, second, third = parse_settings("1x128, 16x256:0.5M,2x8:500", MEDIUM // 2)
    assert first == Setting(1, 128, 11.07e6 / 2)
    assert second == Setting(16, 256, 0.5e6)
    assert third == Setting(2, 8, 500.0)
    assert third.name == "2x8"


def test_the_word_paper_stands_for_the_paper_s_three() -> None:
    settings = parse_settings("paper,1x32", MEDIUM)
    assert [own.name for own in settings] == ["32x512", "16x256", "1x128", "1x32"]
    assert [own.parameters for own in settings] == [0.52e6, 11.07e6, 11.07e6, 11.07e6]


@pytest.mark.parametrize(
    "text", ["", "1", "1x", "x1", "1x2x3", "1x128:", "1x128:11G", "-1x2", "1x2,,1x3", "0x4", "4x0", "1x1:0"]
)
def test_something_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^settings: expected"):
        parse_settings(text, MEDIUM)


def test_a_setting_stands_once() -> None:
    with pytest.raises(ConfigError, match="each once"):
        parse_settings("1x128,paper", MEDIUM)


def test_methods_come_in_their_order_and_others_are_refused() -> None:
    assert parse_methods(" prefix,adapter-h") == ("adapter-h", "prefix")
    assert parse_methods(",".join(METHODS)) == METHODS
    for text in ("", "lora", "full", "control"):
        with pytest.raises(ConfigError, match=r"^methods: expected some of lora-merged"):
            parse_methods(text)


def test_a_text_must_fit_with_what_stands_before_it_and_a_token_more() -> None:
    check_context([Setting(1, 7, 1.0)], 10, 2)
    check_context([Setting(1, 70, 1.0)], None, 2)
    with pytest.raises(ConfigError, match="1x8: expected a length of at most 7, for the model has 10"):
        check_context([Setting(1, 8, 1.0)], 10, 2)


@pytest.mark.parametrize(("name", "value"), [("rounds", 1), ("blocks", 0), ("threads", 0)])
def test_too_little_effort_is_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: expected at least"):
        Effort(**{name: value})
