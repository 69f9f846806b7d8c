"""The parts of a sweep: target sets, sizes, the table, what is held out, and the picture."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from task_fixtures import tiny_bart, tiny_bert, tiny_t5
from torch_fixtures import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from loracle.reference import ConfigError, TargetError
from loracle.torch_impl.data import Completion, Conversation, Labelled, Tagged, Text, Turn
from loracle.torch_impl.rank_sweep import RankSweepOptions
from loracle.torch_impl.rank_sweep.cell import Cell, CellRecord
from loracle.torch_impl.rank_sweep.held_out import read_divided, split
from loracle.torch_impl.rank_sweep.plot import rank_plot, short_count
from loracle.torch_impl.rank_sweep.sizes import TargetSet, check_rank, measure_set, rank_of_equal_size
from loracle.torch_impl.rank_sweep.table import Entry, best_of, enough, entry_of, untrained
from loracle.torch_impl.rank_sweep.target_sets import target_modules
from loracle.torch_impl.tasks import task_named


def entry(targets: str, rank: int, score: float | None) -> Entry:
    return Entry(targets, rank, rank, 10 * rank, score, score, score, 1.0, int(score is None))


def test_letters_stand_for_what_a_model_calls_them() -> None:
    assert target_modules(tiny_llama(), "qkvo") == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert target_modules(tiny_bart(), "qkvo") == ("q_proj", "k_proj", "v_proj", "out_proj")
    assert target_modules(tiny_bert(), "qkvo") == ("query", "key", "value", "attention.output.dense")
    assert target_modules(tiny_bert(), "kv") == ("key", "value")
    both = ("SelfAttention.q", "EncDecAttention.q", "SelfAttention.v", "EncDecAttention.v")
    assert target_modules(tiny_t5(), "qv") == both
    assert target_modules(tiny_llama(), "all-linear") == "all-linear"
    assert target_modules(tiny_llama(), "up_proj, v_proj") == ("up_proj", "v_proj")


def test_a_fused_projection_has_no_letter_of_its_own() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
    with pytest.raises(TargetError, match=r"targets: .* each letter of 'qv', which GPT2LMHeadModel has not"):
        target_modules(model, "qv")


def test_a_set_is_measured_without_a_trace() -> None:
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one = measure_set(model, "qv")
    assert (one.layers, one.per_rank, one.largest) == (4, 2 * (32 + 24), 8)
    assert one.narrowest == "model.layers.0.self_attn.v_proj"
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    check_rank(one, 8)
    with pytest.raises(
        ConfigError, match=r"at most 8, the smaller dimension of model.layers\.0\.self_attn\.v_"
    ):
        check_rank(one, 9)


def test_ranks_of_equal_size_are_the_papers() -> None:
    q = TargetSet("q", ("q",), 1, 100, 64, "")
    qv, qkvo = replace(q, per_rank=200), replace(q, name="qkvo", per_rank=400)
    assert [rank_of_equal_size(q, other, 8) for other in (q, qv, qkvo)] == [8, 4, 2]
    assert rank_of_equal_size(q, qkvo, 7) == 1
    with pytest.raises(ConfigError, match="'q' of at least 4, with whose parameters 'qkvo' can have rank 1"):
        rank_of_equal_size(q, qkvo, 3)


def test_an_entry_is_the_mean_of_the_seeds_that_trained() -> None:
    record = CellRecord(Cell("q", 3, 0), 2, 30, 30, 99, 5, 2.0, 1.0, {"loss": 4.0}, {"loss": 1.0})
    other = replace(record, cell=Cell("q", 3, 1), seconds=4.0, before={"loss": 5.0}, after={"loss": 2.0})
    failed = replace(record, cell=Cell("q", 3, 2), seconds=0.0, before=None, after=None, diverged="why")
    found = entry_of("q", 8, [record, other, failed], "loss")
    assert found == Entry("q", 8, 3, 30, 1.5, 1.0, 2.0, 2.0, 1)
    assert entry_of("q", 8, [failed], "loss").score is None
    assert untrained([record, record, other, failed], "loss") == 4.5
    assert untrained([failed], "loss") is None
    assert CellRecord.from_json(json.loads(json.dumps(other.to_json()))) == other
    with pytest.raises(TypeError):
        CellRecord.from_json({**other.to_json(), "more": 1})


def test_enough_is_a_share_of_what_the_best_gains() -> None:
    table = [
        entry("q", 1, 3.0),
        entry("q", 4, 2.1),
        entry("qv", 1, None),
        entry("qv", 4, 2.0),
        entry("k", 1, 3.9),
        entry("k", 4, 2.3),
    ]
    assert best_of(table, lower_is_better=True) == table[3]
    found = {one.targets: (one.rank, one.parameters) for one in enough(table, 4.0, 0.9, True)}
    assert found == {"q": (4, 40), "qv": (4, 40), "k": (None, None)}
    assert [one.rank for one in enough(table, 4.0, 0.5, True)] == [1, 4, 4]
    assert best_of(table, lower_is_better=False) == table[4]
    assert [one.rank for one in enough(table, 2.9, 0.95, False)] == [None, None, 1]
    # Nothing is enough of no gain.
    assert [one.rank for one in enough(table, 1.0, 0.5, True)] == [None, None, None]
    assert best_of([entry("q", 1, None)], lower_is_better=True) is None
    equal = [entry("q", 1, 2.0), entry("q", 4, 2.0)]
    assert best_of(equal, lower_is_better=True) == best_of(equal, lower_is_better=False) == equal[0]


def test_a_question_is_on_one_side_whatever_else_there_is(tmp_path: Path) -> None:
    texts = [Completion(at, None, f"word {at}", "x") for at in range(200)]
    train, held_out = split(texts, 0.25)
    assert len(train) + len(held_out) == 200
    assert 30 <= len(held_out) <= 70
    again = [
        Completion(0, "other", f"  {one.prompt.upper()} ", "y")
        for one in held_out
        if isinstance(one, Completion)
    ]
    assert split(again, 0.25) == ([], again)
    # Every form has a question.
    turns = (Turn("user", "word 1"), Turn("assistant", "anything"))
    side = split([texts[1]], 0.25)[0] == []
    for one in (Conversation(0, turns), Text(0, "word 1"), Tagged(0, ("word 1",), (0,))):
        assert (split([one], 0.25)[0] == []) == side
    pair = [Labelled(at, "a", f"{at}", "x") for at in range(50)]
    assert all(split(pair, 0.5))


def test_the_lines_are_those_of_the_file(tmp_path: Path) -> None:
    rows = [
        json.dumps({"prompt": f"é {at}", "completion": "a\u2028b"}, ensure_ascii=False) for at in range(20)
    ]
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(rows).encode())
    own = RankSweepOptions("m", data, tmp_path / "out", eval_share=0.3)
    divided = read_divided(own, task_named("causal-lm"))
    sides = [part.decode().split("\n") for part in (divided.train, divided.held_out)]
    lines = [[line.strip("\r") for line in side if line.strip()] for side in sides]
    assert sorted(lines[0] + lines[1]) == sorted(rows)
    assert [len(side) for side in lines] == [divided.train_rows, divided.held_out_rows]
    assert [json.loads(line)["prompt"] for line in lines[0]] == [
        one.prompt for one in divided.examples if isinstance(one, Completion)
    ]


def test_the_picture_has_every_entry_and_frames_the_best(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: dict[tuple[float, float], tuple[str, str]] = {}
    frames: list[tuple[float, float]] = []
    text, patch = Axes.text, Axes.add_patch

    def texts(axes: Axes, x: float, y: float, s: str, **style: Any) -> Any:
        drawn[x, y] = (s, str(style["color"]))
        return text(axes, x, y, s, **style)

    def patches(axes: Axes, one: Any) -> Any:
        if not one.get_fill():
            frames.append(one.get_xy())
        return patch(axes, one)

    monkeypatch.setattr(Axes, "text", texts)
    monkeypatch.setattr(Axes, "add_patch", patches)
    table = [
        replace(entry("q", 1, 3.0), low=2.9, high=3.1),
        replace(entry("q", 8, 2.0), r=4),
        entry("qv", 1, None),
        entry("qv", 8, 1.0),
    ]
    for name in ("one", "same"):
        rank_plot(table, tmp_path / name, metric="loss", lower_is_better=True, title="t")
    assert drawn == {
        (0, 0): ("3.000\n2.900 to 3.100\n10", "black"),
        (1, 0): ("2.000\nr = 4, 80", "black"),
        (0, 1): ("diverged\n10", "black"),
        (1, 1): ("1.000\n80", "white"),
    }
    assert list(frames[0]) == pytest.approx([0.54, 0.54])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "same").read_bytes()
    rank_plot(table, tmp_path / "higher", metric="accuracy", lower_is_better=False, title="t")
    assert (drawn[0, 0][1], drawn[1, 1][1]) == ("white", "black")


def test_counts_have_three_digits() -> None:
    assert [short_count(n) for n in (7, 999, 1_000, 1_843_200, 2_500_000_000)] == [
        "7",
        "999",
        "1k",
        "1.84M",
        "2.5G",
    ]
