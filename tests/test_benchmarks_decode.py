"""The side-by-side decoding: its order, its ways, its parity check, its result file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime_genai")

from export_fixtures import make_adapter, make_model

from benchmarks import decode, decode_parity, decode_ways, interleaved
from benchmarks.answer import Answer
from benchmarks.decode_folders import weight_bytes
from benchmarks.decode_parity import differences, first_difference
from benchmarks.decode_report import Times, checks, row_of
from benchmarks.decode_ways import BASE, CONTROL, GENAI, OURS, Subject
from benchmarks.llama_model import LlamaShape, write_llama
from loracle.export import DecoderSession, export

PROMPT = (5, 77, 30, 12)
NEW_TOKENS = 8


@pytest.fixture(autouse=True)
def _shared_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("decode") / "base")


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    export(base, base.parent / "onnx")
    return base.parent / "onnx"


@pytest.fixture(scope="module")
def text(folder: Path) -> tuple[int, ...]:
    return decode_ways.ours(folder, 1)(PROMPT, NEW_TOKENS).tokens


def test_every_way_stands_twice_between_two_answers_of_ours() -> None:
    called = []
    # Ours slows down in prefill: 1, 2, 4 seconds; its decoding gets faster: 8, 4, 2.
    clock = {
        "O": iter(((1.0, 8.0), (2.0, 4.0), (4.0, 2.0))),
        "X": iter(((3.0, 1.0), (6.0, 2.0))),
        "Y": iter(((12.0, 5.0), (24.0, 7.0))),
    }

    def runner(name: str) -> Any:
        def run() -> tuple[float, float]:
            called.append(name)
            return next(clock[name])

        return run

    ratios = list(interleaved.chain(runner("O"), [runner("X"), runner("Y")]))
    assert "".join(called) == "OXXOYYO"
    assert ratios == [(9 / 3, 3 / 12), (36 / 6, 12 / 6)]


def test_every_second_round_opens_and_answers_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "read_bandwidth", lambda threads: 5.0)
    opened, answered = [], []

    def subject(name: str, seconds: float) -> Subject:
        def answer(prompt: Sequence[int], new_tokens: int) -> Answer:
            if new_tokens != interleaved.WARM_TOKENS:
                answered.append(name)
            return Answer((), seconds, 10 * seconds)

        def opens() -> Any:
            opened.append(name)
            return answer

        return Subject(name, opens)

    subjects = [subject("O", 1.0), subject("X", 2.0), subject("Y", 4.0)]
    times, bandwidths = decode.measure(subjects, [PROMPT], NEW_TOKENS, rounds=2, threads=1)
    assert "".join(opened) == "OXYYXO"
    assert "".join(answered) == "OXXOYYOOYYOXXO"
    assert bandwidths == [5.0, 5.0]
    assert times["X", PROMPT] == Times([2.0, 2.0], [20.0, 20.0], [2.0, 2.0], [2.0, 2.0])
    assert times["Y", PROMPT].decode_ratios == [4.0, 4.0]
    assert times["O", PROMPT] == Times([1.0, 1.0], [10.0, 10.0], [], [])


def test_a_forced_session_reads_the_text_that_it_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = DecoderSession.decode

    def spy(self: DecoderSession, tokens: Any) -> Any:
        read.extend(tokens)
        return plain(self, tokens)

    monkeypatch.setattr(DecoderSession, "decode", spy)
    forced = list(range(50, 50 + NEW_TOKENS))
    answer = decode_ways.ours_forced(folder, 1, {PROMPT: forced})
    for _ in range(2):
        read.clear()
        assert len(answer(PROMPT, NEW_TOKENS).tokens) == NEW_TOKENS
        assert read == forced[: NEW_TOKENS - 1]


def test_no_token_ends_an_answer_of_a_peer(base: Path, folder: Path, text: tuple[int, ...]) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] not in text
    config["model"]["eos_token_id"] = text[1]
    ending = folder.parent / "ending"
    export(base, ending)
    (ending / "genai_config.json").write_text(json.dumps(config))
    assert decode_ways.genai(ending, 1, {PROMPT: text})(PROMPT, NEW_TOKENS).tokens == text
    for attention in decode_ways.ATTENTION:
        for cache in decode_ways.CACHES:
            answer = decode_ways.transformers(base, attention, cache)
            found = answer(PROMPT, NEW_TOKENS)
            assert found.tokens == text
            assert found.first > 0
            assert found.rest > 0


def test_transformers_own_end_token_is_taken_away(base: Path, text: tuple[int, ...], tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": text[1]}))
    answer = decode_ways.transformers(tmp_path / "model", "sdpa", "dynamic")
    assert answer(PROMPT, NEW_TOKENS).tokens == text


@dataclass(frozen=True)
class _Right:
    logits: np.ndarray
    tolerance: float


class _Model:
    """Likes token t by t; its tolerance is 1."""

    evaluated: list[tuple[int, ...]]

    def __init__(self, base: Path, adapter: Any) -> None:
        _Model.evaluated = []

    def evaluate(self, sequences: Sequence[tuple[int, ...]], dtype: Any) -> list[_Right]:
        _Model.evaluated += sequences
        return [_Right(np.tile(np.arange(10.0), (len(own), 1)), 1.0) for own in sequences]


@pytest.mark.parametrize(
    ("ours", "other", "margin"),
    [((1, 9, 3), (1, 7, 4), 2.0), ((1, 7, 3), (1, 9, 3), 2.0), ((1, 6, 3), (1, 9, 3), 3.0)],
)
def test_both_choices_must_be_near_the_most_likely(
    monkeypatch: pytest.MonkeyPatch,
    ours: tuple[int, ...],
    other: tuple[int, ...],
    margin: float,
) -> None:
    monkeypatch.setattr(decode_parity, "Float64Model", _Model)
    monkeypatch.setattr(decode_parity, "read_adapter", lambda folder: None)
    texts = {(5, 6): ours}
    others = {("same", (5, 6)): ours, ("other", (5, 6)): other}
    if margin <= 2:
        found = differences(Path(), Path(), texts, others)
        assert found == {("other", (5, 6)): decode_parity.Difference(1, margin, 2.0)}
    else:
        with pytest.raises(SystemExit) as error:
            differences(Path(), Path(), texts, others)
        assert str(error.value) == (
            "nothing to compare\nother, prompt of 2 tokens: token 1 is another than ours by a margin of 3, "
            "rounding explains 2"
        )
    assert _Model.evaluated == [(5, 6, 1)]


def test_a_wrong_token_is_refused(base: Path, text: tuple[int, ...], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    wrong = (*text[:3], (text[3] + 1) % 256, *text[4:])
    with pytest.raises(SystemExit, match="some way, prompt of 4 tokens: token 3 is another than ours"):
        differences(base, adapter, {PROMPT: text}, {("some way", PROMPT): wrong})


def test_answers_are_compared_to_their_ends() -> None:
    assert first_difference((1, 2, 3), (1, 2, 3)) is None
    assert first_difference((1, 2, 3), (1, 2, 4)) == 2
    with pytest.raises(SystemExit, match="expected answers of one length, got 3 and 2 tokens"):
        first_difference((1, 2, 3), (1, 2))


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_every_weight_but_an_embedding_that_is_no_head(tied: bool, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", tied=tied)
    hidden, inner, queries, keys = 48, 80, 64, 32
    layer = 2 * queries * hidden + 2 * keys * hidden + 3 * inner * hidden + 2 * hidden
    assert weight_bytes(base) == 4 * (2 * layer + hidden + 264 * hidden)


def test_a_row_is_of_medians_and_its_share_of_each_rounds_bandwidth() -> None:
    times = Times([1.0, 3.0, 2.0], [2.0, 4.0, 8.0], [1.0, 1.5, 2.0], [0.5, 1.0, 4.0])
    row = row_of("way", 18, 5, times, weight_bytes=6, bandwidths=[12.0, 12.0, 1.0])
    assert row["decode_tokens_per_second"] == 1.0
    assert row["prefill_seconds"] == 2.0
    # 4 steps of 6 bytes in 2, 4, 8 seconds: 12, 6, 3 bytes a second.
    assert row["share"] == 1.0
    assert (row["prefill_ratio"], row["decode_ratio"]) == (1.5, 1.0)
    assert row["decode_interval"] == (0.5, 4.0, 0.75)


def test_the_aims_allow_what_the_control_shows() -> None:
    def rows(control: float) -> list[dict[str, Any]]:
        ratios = {CONTROL: control, BASE: 0.98, GENAI: 1.05}
        return [
            {
                "way": name,
                "prompt": 18,
                **{f"{phase}_ratio": ratio for phase in ("prefill", "decode")},
                **{f"{phase}_interval": (ratio, ratio, 0.0) for phase in ("prefill", "decode")},
            }
            for name, ratio in ratios.items()
        ]

    def held(control: float) -> dict[str, bool]:
        return {check["check"]: check["holds"] for check in checks(rows(control))}

    strict = {
        f"{phase}, over {name}": name == GENAI for phase in ("prefill", "decode") for name in (BASE, GENAI)
    }
    assert held(0.9) == strict
    assert held(1.03) == dict.fromkeys(strict, True)


@pytest.mark.slow
def test_the_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "decode.json"
    decode.main(["--quick", "--threads", "1", "--ways", BASE, CONTROL, "--out", str(out)])
    result = json.loads(out.read_text())
    assert [(row["prompt"], row["way"]) for row in result["rows"]] == [
        (length, name) for length in (4, 8) for name in (OURS, CONTROL, BASE)
    ]
    assert result["explained_differences"] == []
    assert result["rows"][0]["decode_ratio"] is None
    assert all(row["decode_ratio"] == row["decode_ratios"][0] > 0 for row in result["rows"][1:3])
    assert [check["check"] for check in result["checks"]] == 2 * [
        "prefill, over base model",
        "decode, over base model",
    ]
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "base model" in printed


def test_optimum_needs_its_packages(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"expected a Python with the packages of benchmarks/peers\.txt"):
        decode.main(["--optimum", str(tmp_path / "python")])


def test_a_prompt_longer_than_the_text_is_refused(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", LlamaShape(8, 1, 1, 1, 8, 258))
    with pytest.raises(SystemExit, match=r"--prompts: expected at most \d+ tokens, got 1000000"):
        decode.prompt(base, 1_000_000)
    assert decode.prompt(base, 7) == decode.prompt(base, 9)[:7]
