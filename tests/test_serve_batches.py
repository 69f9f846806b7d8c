"""Which prompts are answered together: one task's, the oldest's, in order, as many as fit."""

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.export import Sampling
from loracle.serve.batches import BatchLimits, capacity, choose
from loracle.serve.rows import Row

LIMITS = BatchLimits(rows=4, tokens=1024, context=512)


def row(task: str | None, prompt: int = 10, answer: int = 10) -> Row:
    return Row(0, task, (1,) * prompt, answer, Sampling(), frozenset(), cast(Any, None), lambda event: None)


def test_the_oldest_decides_the_task_and_the_others_keep_their_order() -> None:
    waiting = [row("a"), row("b"), row(None), row("a"), row("b"), row("a")]
    assert choose(waiting, LIMITS) == [waiting[0], waiting[3], waiting[5]]
    assert choose(waiting[1:], LIMITS) == [waiting[1], waiting[4]]
    assert choose(waiting[2:], LIMITS) == [waiting[2]]


def test_no_more_rows_than_may_be() -> None:
    waiting = [row("a") for _ in range(6)]
    assert choose(waiting, LIMITS) == waiting[:4]


def test_rows_are_padded_to_the_longest_prompt_and_the_longest_answer() -> None:
    long, short = row("a", 300, 10), row("a", 10, 10)
    assert choose([long, short, short, short], LIMITS) == [long, short]  # of 384 tokens each
    # Each of them fits into the context, and both in step do not.
    assert choose([long, row("a", 10, 300), short], LIMITS) == [long, short]


def test_one_row_is_taken_whatever_its_length() -> None:
    long = row("a", 300, 200)
    assert choose([long, row("a")], BatchLimits(4, 16, 512)) == [long]


@pytest.mark.parametrize(
    ("lengths", "wanted"), [([(1, 1)], 128), ([(100, 28)], 128), ([(100, 29)], 256), ([(400, 112)], 512)]
)
def test_caches_have_one_of_few_sizes(lengths: list[tuple[int, int]], wanted: int) -> None:
    assert capacity([row("a", *one) for one in lengths], LIMITS) == wanted


def test_a_cache_is_no_larger_than_the_context() -> None:
    assert capacity([row("a", 150, 10)], BatchLimits(4, 1024, 200)) == 200


shapes = st.tuples(st.sampled_from("ab"), st.integers(1, 250), st.integers(1, 250))


@given(st.lists(shapes, min_size=1, max_size=12))
def test_every_choice_keeps_the_limits(rows: list[tuple[str, int, int]]) -> None:
    waiting = [row(*one) for one in rows]
    chosen = choose(waiting, LIMITS)
    assert chosen[0] is waiting[0]
    assert {one.task for one in chosen} == {waiting[0].task}
    assert len(chosen) <= LIMITS.rows
    size = capacity(chosen, LIMITS)
    assert max(len(one.prompt) for one in chosen) + max(one.max_tokens for one in chosen) <= size <= 512
    assert len(chosen) == 1 or len(chosen) * size <= LIMITS.tokens
