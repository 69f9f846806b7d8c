"""The split: decided by a hash, the same every time, and nothing held out is given away in training."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.demo import tasks
from loracle.demo.settings import SUMMARIZE, TASKS, TRANSLATE
from loracle.demo.tasks import build_tasks, normalise, split

WORDS = st.text("abcdeé", min_size=1, max_size=6)
PAIRS = st.lists(st.tuples(st.lists(WORDS, min_size=1, max_size=8).map(" ".join), WORDS), max_size=30)


def many(count: int) -> list[tuple[str, str]]:
    """Return pairs whose sources share no words and no targets."""
    letters = "abcdefghij"
    names = ["".join(letters[int(digit)] for digit in f"{number:04}") for number in range(count)]
    return [(f"source {name}", f"target {name}") for name in names]


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("  Enter 12 digits. ", "enter digits"),
        ("ENTER digits", "enter digits"),
        ("Enter %(max)d digits", "enter digits"),
        ("Enter {name} digits", "enter digits"),
        ("Straße", "strasse"),
        ("12:30 …", ""),
    ],
)
def test_normalise(text: str, normalised: str) -> None:
    assert normalise(text) == normalised


@given(PAIRS, st.integers(0, 100))
def test_sides_share_no_source_and_no_target(pairs: list[tuple[str, str]], percent: int) -> None:
    train, heldout = split(pairs, percent)
    sources, targets = ({normalise(pair[i]) for pair in train} for i in (0, 1))
    assert sources.isdisjoint(normalise(source) for source, _ in heldout)
    assert targets.isdisjoint(normalise(target) for _, target in heldout)
    assert len(sources) == len(train)
    assert set(train) | set(heldout) <= set(pairs)


@given(PAIRS, st.randoms(use_true_random=False))
def test_what_is_held_out_does_not_depend_on_the_order(pairs: list[tuple[str, str]], random: object) -> None:
    distinct = list({normalise(source): (source, target) for source, target in pairs}.values())
    assert split(distinct, 30)[1] == split(sorted(distinct), 30)[1] == split(distinct[::-1], 30)[1]


def test_a_larger_share_keeps_what_a_smaller_one_held_out() -> None:
    pairs = many(400)
    small, large = split(pairs, 10)[1], split(pairs, 30)[1]
    assert set(small) < set(large)
    assert 20 <= len(small) <= 60
    assert 90 <= len(large) <= 150
    assert split(pairs, 0) == (pairs, [])
    assert split(pairs, 100)[0] == []


def test_the_order_of_held_out_text_is_not_that_of_the_source() -> None:
    pairs = many(100)
    train, heldout = split(pairs, 50)
    assert train == sorted(train)
    assert heldout != sorted(heldout)


@pytest.mark.parametrize(
    ("shared", "trained"),
    # Of ten words each the first few are shared: n - 2 common sequences of three in 2 * 8 - (n - 2) in all.
    [(10, False), (7, False), (6, True), (3, True), (0, True)],
)
def test_near_copies_of_held_out_text_are_not_trained_on(
    shared: int, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    copy = " ".join([*words[:shared], *(f"other{letter}" for letter in "abcdefghij"[shared:])])
    source = " ".join(words)
    copy = copy if shared < 10 else f"{source} too"
    monkeypatch.setattr(tasks, "_digest", lambda key: 0 if key == source else 99)
    expected = [(copy, "y")] if trained else []
    assert split([(source, "x"), (copy, "y")], 10) == (expected, [(source, "x")])


def test_pairs_with_a_held_out_target_are_not_trained_on() -> None:
    pairs = many(100)
    heldout = split(pairs, 10)[1]
    twin = ("quite another text", heldout[0][1].upper())
    assert twin not in split([*pairs, twin], 10)[0]


def test_of_equal_sources_the_first_is_kept() -> None:
    assert split([("Log out", "a"), ("log out!", "b"), ("12", "c")], 0) == ([("Log out", "a")], [])


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "cached_wheel", lambda *arguments: Path("django.whl"))
    monkeypatch.setattr(tasks, "translation_pairs", lambda wheel, language: many(200))
    monkeypatch.setattr(tasks, "docstring_pairs", lambda packages: many(300))


@pytest.mark.usefixtures("sources")
def test_files_hold_every_row_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    first = build_tasks(tmp_path / "first")
    second = build_tasks(tmp_path / "second")
    assert list(first) == [task.name for task in TASKS]
    for task, pairs in ((TRANSLATE, many(200)), (SUMMARIZE, many(300))):
        files = first[task.name]
        train, heldout = split(pairs, task.heldout_percent)
        for path, rows, count in (
            (files.train, train, files.train_rows),
            (files.heldout, heldout, files.heldout_rows),
        ):
            assert len(rows) == count
            assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [
                {"system": task.system, "prompt": source, "completion": target} for source, target in rows
            ]
        assert files.train.name == f"{task.name}.train.jsonl"
        assert files.heldout.name == f"{task.name}.heldout.jsonl"
        assert files.train.read_bytes() == second[task.name].train.read_bytes()
        assert files.heldout.read_bytes() == second[task.name].heldout.read_bytes()
    assert len(list((tmp_path / "first").iterdir())) == 4


@pytest.mark.usefixtures("sources")
def test_origins_name_the_versions(tmp_path: Path) -> None:
    import numpy as np

    built = build_tasks(tmp_path)
    assert "django 5.2.19" in built["translate"].origin
    assert f"numpy {np.__version__} and scipy" in built["summarize"].origin
