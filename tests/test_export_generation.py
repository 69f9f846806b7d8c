"""Generation in batches: each row is its prompt's own answer, whatever stands beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from export_fixtures import make_model
from refusal import refused

from loracle.export import DecoderSession, Sampling, export, generate, greedy, open_session
from loracle.export.verification.outputs_check import Generated, first_token_difference
from loracle.export.verification.truth import Float64Model
from loracle.reference import ConfigError, ShapeError

PROMPTS = ([5, 77, 30, 12, 90, 41, 3], [8], [200, 100, 50, 20], [5, 77, 30, 12, 90, 41, 3])
NEW = 12
CAPACITY = 7 + NEW
DRAWN = Sampling(temperature=1.0, top_k=40, top_p=0.9)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("generate") / "base")


@pytest.fixture(scope="module")
def opened(base: Path) -> onnxruntime.InferenceSession:
    export(base, base.parent / "onnx")
    return open_session(base.parent / "onnx", threads=1)


def answers(
    opened: onnxruntime.InferenceSession, prompts: Sequence[list[int]], new: int = NEW, **options: Any
) -> dict[int, list[int]]:
    session = DecoderSession(opened, max(map(len, prompts)) + new - 1, batch=len(prompts))
    found: dict[int, list[int]] = defaultdict(list)
    for row, token in generate(session, prompts, new, **options):
        found[row].append(token)
    return dict(found)


def test_greedy_tokens_of_a_batch_are_those_of_the_model(
    base: Path, opened: onnxruntime.InferenceSession
) -> None:
    found = answers(opened, PROMPTS)
    truth = Float64Model(base, None)
    for row, prompt in enumerate(PROMPTS):
        ids = (*prompt, *found[row])
        (right,) = truth.evaluate([ids[:-1]], np.dtype(np.float32))
        generated = Generated(ids, len(prompt), right.logits)
        assert len(found[row]) == NEW
        assert first_token_difference(generated, right.logits, right.tolerance) is None


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN, Sampling(1.5)])
def test_a_row_is_its_prompts_answer_alone(opened: onnxruntime.InferenceSession, sampling: Sampling) -> None:
    found = answers(opened, PROMPTS, sampling=sampling)
    for row in range(3):
        assert answers(opened, [PROMPTS[row]], sampling=sampling) == {0: found[row]}
    turned = answers(opened, [PROMPTS[2], PROMPTS[0], PROMPTS[1]], sampling=sampling)
    assert [turned[1], turned[2], turned[0]] == [found[0], found[1], found[2]]
    # The same prompt again: the same answer where it is the most likely, another where it is drawn.
    assert (found[3] == found[0]) == sampling.greedy


def test_rows_with_samplings_of_their_own_are_answered_as_alone(
    opened: onnxruntime.InferenceSession,
) -> None:
    samplings = [DRAWN, Sampling(), replace(DRAWN, seed=3), Sampling(1.5, seed=2)]
    found = answers(opened, PROMPTS, sampling=samplings)
    for row, sampling in enumerate(samplings):
        assert answers(opened, [PROMPTS[row]], sampling=sampling) == {0: found[row]}


def test_what_is_drawn_depends_on_the_seed_alone(opened: onnxruntime.InferenceSession) -> None:
    first = answers(opened, PROMPTS, sampling=DRAWN)
    assert first == answers(opened, PROMPTS, sampling=DRAWN)
    other = answers(opened, PROMPTS, sampling=replace(DRAWN, seed=1))
    assert all(first[row] != other[row] for row in range(4))


def test_rows_end_at_their_own_stop_token_and_the_others_go_on(
    opened: onnxruntime.InferenceSession,
) -> None:
    """Drawn answers: greedy ones of a random model soon repeat one token."""
    whole = answers(opened, PROMPTS, sampling=DRAWN)
    stop = frozenset({whole[0][1], whole[1][4], whole[2][0]})
    expected = {
        row: tokens[: 1 + next((i for i, token in enumerate(tokens) if token in stop), NEW)]
        for row, tokens in whole.items()
    }
    assert len({len(tokens) for tokens in expected.values()}) > 2
    assert answers(opened, PROMPTS, sampling=DRAWN, stop=stop) == expected


@pytest.mark.parametrize(
    "lengths", [(1, 1, 1, 1), (NEW, 1, 1, 1), (1, 5, 2, NEW), (3, 3, NEW, 4), (2, NEW, 9, 9)]
)
def test_rows_end_where_the_caller_says_so(
    opened: onnxruntime.InferenceSession, lengths: tuple[int, ...]
) -> None:
    """However many are left, in whatever places: rows that go on alone are still themselves."""
    whole = answers(opened, PROMPTS, sampling=DRAWN)
    count = [0] * 4

    def finished(row: int) -> bool:
        count[row] += 1
        return count[row] == lengths[row]

    found = answers(opened, PROMPTS, sampling=DRAWN, finished=finished)
    assert found == {row: whole[row][: lengths[row]] for row in range(4)}


def test_once_half_of_the_rows_have_ended_the_others_are_computed_alone(
    opened: onnxruntime.InferenceSession,
) -> None:
    session = DecoderSession(opened, CAPACITY, batch=4)
    rows = [session.rows for _ in generate(session, PROMPTS, 4, finished=lambda row: row in (0, 2))]
    assert rows == [4] * 4 + [2] * 6
    assert sum(1 for _ in generate(session, PROMPTS, 4)) == 16


def test_no_step_follows_the_last_token(opened: onnxruntime.InferenceSession) -> None:
    """Nothing is computed for a token that is not wanted, so it needs no room either."""
    session = DecoderSession(opened, 7 + 3 - 1)
    assert len(list(generate(session, PROMPTS[:1], 3))) == 3
    assert session.length == 9
    assert len(list(generate(session, PROMPTS[:1], 3, finished=lambda _: True))) == 1
    assert session.length == 7


def test_greedy_yields_the_logits_that_chose_the_token(opened: onnxruntime.InferenceSession) -> None:
    session = DecoderSession(opened, CAPACITY)
    rows = [(token, logits.copy()) for token, logits in greedy(session, PROMPTS[0], 4)]
    assert [len(logits) for _, logits in rows] == [7, 1, 1, 1]
    assert [token for token, _ in rows] == [int(logits[-1].argmax()) for _, logits in rows]
    assert [token for token, _ in rows] == answers(opened, PROMPTS[:1], 4)[0]
    stopped = [token for token, _ in greedy(session, PROMPTS[0], 4, frozenset({rows[0][0]}))]
    assert stopped == [rows[0][0]]


def test_what_cannot_be_answered_is_refused_before_anything_runs(
    opened: onnxruntime.InferenceSession,
) -> None:
    session = DecoderSession(opened, 8, batch=2)
    refused(
        lambda: generate(session, PROMPTS[:2], 0), ConfigError, "max_new_tokens: expected at least 1, got 0"
    )
    refused(
        lambda: generate(session, PROMPTS[:2], 3),
        ShapeError,
        "capacity: expected at least 9 for the longest prompt and 3 new tokens, got 8; "
        "open the session with a larger capacity",
    )
    refused(
        lambda: list(generate(session, [[1]], 3)),
        ShapeError,
        "prompts: expected 2, one a row, got 1; open the session with batch=1",
    )
