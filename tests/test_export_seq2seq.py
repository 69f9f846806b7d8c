"""Encoder and decoder as three graphs: one data file, greedy targets of transformers, rows, and refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers as hf
from architecture_runs import TASK
from architectures import VOCABULARY, make
from refusal import refused

from loracle.export import Seq2SeqSession, export, generate, seq2seq_session
from loracle.export.host_inputs import HostInputs
from loracle.export.names import DATA_FILE, DECODER_FILE, DECODER_WITH_PAST_FILE, ENCODER_FILE, PAST_LENGTH
from loracle.export.past_length import let_length_be_told
from loracle.export.seq2seq_model import Seq2SeqModel, is_seq2seq, open_seq2seq, start_tokens
from loracle.export.verification.truth import Float64Model
from loracle.export.write import ALIGNMENT
from loracle.reference import ConfigError, DataError, FileError, ShapeError, TargetError

GRAPHS = (ENCODER_FILE, DECODER_FILE, DECODER_WITH_PAST_FILE)
FLOAT32 = np.dtype(np.float32)
SOURCES = ([5, 77, 30, 12, 90, 41, 3], [8], [200, 100, 50, 20], [17, 4])
FOLLOWING = np.array([[9, 30, 77], [1, 2, 3], [250, 249, 248], [60, 61, 62]])
NEW = 12


@pytest.fixture(scope="module", params=["t5", "bart"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model, its base beside it."""
    root = tmp_path_factory.mktemp(request.param)
    export(make(root / "base", request.param), root / "onnx")
    return root / "onnx"


@pytest.fixture(scope="module")
def opened(folder: Path) -> Seq2SeqModel:
    return open_seq2seq(folder, threads=1)


@pytest.fixture(scope="module")
def truth(folder: Path) -> Float64Model:
    return Float64Model(folder.parent / "base", None, TASK["text2text-generation"])


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "onnx"))


def check_row(
    logits: Sequence[np.ndarray], source: Sequence[int], target: Sequence[int], truth: Float64Model
) -> None:
    """Logits of the last positions of a target lie inside the derived bound; the source is not padded."""
    feeds = {
        "input_ids": np.array([source]),
        "attention_mask": np.ones((1, len(source)), np.int64),
        "decoder_input_ids": np.array([target]),
    }
    right = truth.evaluate_feeds(feeds, FLOAT32)["logits"]
    assert np.abs(np.stack(logits) - right.logits[0, -len(logits) :]).max() <= right.tolerance


def places(folder: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Where each graph's initializers lie in the data file: offset and length, by file and name."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for file in GRAPHS:
        graph = onnx.load(str(folder / file), load_external_data=False).graph
        entries = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer}
        assert {own["location"] for own in entries.values() if own} == {DATA_FILE}
        found[file] = {n: (int(own["offset"]), int(own["length"])) for n, own in entries.items() if own}
    return found


def test_a_tensor_of_several_graphs_lies_in_the_data_file_once(folder: Path) -> None:
    encoder, first, later = places(folder).values()
    every = {**encoder, **first, **later}
    for own in (encoder, first, later):
        assert own == {name: every[name] for name in own}
    assert later.keys() < first.keys()  # the keys and values of the encoder's states are computed once
    assert set(encoder) & set(first)
    runs = sorted(set(every.values()))
    assert len(runs) == len(every)
    ends = [0, *(offset + length for offset, length in runs)]
    assert all(0 <= offset - end < ALIGNMENT for end, (offset, _) in zip(ends, runs, strict=False))
    assert (folder / DATA_FILE).stat().st_size == ends[-1]


def expected(folder: Path, sources: Sequence[list[int]], **options: Any) -> dict[int, list[int]]:
    """Greedy targets by transformers, what they begin with included, of sources padded on the right."""
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(folder.parent / "base")
    width = max(map(len, sources))
    ids = torch.tensor([[*source, *[0] * (width - len(source))] for source in sources])
    mask = torch.tensor([[1] * len(source) + [0] * (width - len(source)) for source in sources])
    found = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        forced_eos_token_id=None,
        **options,
    )
    return dict(enumerate(found.tolist()))


def answers(
    model: Seq2SeqModel, sources: Sequence[list[int]], new: int = NEW, **options: Any
) -> dict[int, list[int]]:
    session = Seq2SeqSession(model, len(model.start) + new - 1, batch=len(sources))
    found: dict[int, list[int]] = defaultdict(list)
    for row, token in generate(session, sources, new, **options):
        found[row].append(token)
    return {row: [*model.start, *found[row]] for row in sorted(found)}


def test_greedy_targets_of_a_batch_are_those_of_transformers(folder: Path, opened: Seq2SeqModel) -> None:
    right = expected(folder, SOURCES, max_new_tokens=NEW)
    assert answers(opened, SOURCES) == right
    assert len({tuple(target) for target in right.values()}) > 1
    # Once half of the rows have ended the others go on alone.
    found = answers(opened, SOURCES, finished=lambda row: row in (0, 2))
    assert found == {row: target[: None if row % 2 else 2] for row, target in right.items()}


def test_a_forced_first_token_is_part_of_what_a_target_begins_with(folder: Path, copied: Path) -> None:
    path = copied / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"forced_bos_token_id": 42}))
    model = open_seq2seq(copied, threads=1)
    assert model.start[1:] == (42,)
    right = expected(folder, SOURCES, max_new_tokens=NEW + 1, forced_bos_token_id=42)
    assert answers(model, SOURCES) == right


def test_each_row_of_a_batch_is_its_source_alone(opened: Seq2SeqModel, truth: Float64Model) -> None:
    """Sources of all lengths, then steps; a second batch in the same session sees nothing of the first."""
    session = Seq2SeqSession(opened, 4, batch=4)
    for sources in (SOURCES, SOURCES[::-1]):
        rows = [[own] for own in session.prefill(sources).copy()]
        for tokens in FOLLOWING.T:
            for row, own in zip(rows, session.decode(tokens), strict=True):
                row.append(own.copy())
        for row, source, following in zip(rows, sources, FOLLOWING, strict=True):
            check_row(row, source, [*opened.start, *following], truth)
        assert session.length == 4


def test_rows_that_are_kept_go_on_as_they_were(opened: Seq2SeqModel, truth: Float64Model) -> None:
    """In another order; a prefill brings all rows back."""
    session = Seq2SeqSession(opened, 8, batch=4)
    session.prefill(SOURCES)
    session.decode(FOLLOWING[:, 0])
    session.keep([3, 0])
    assert session.rows == 2
    rows: list[list[np.ndarray]] = [[], []]
    more = np.array([[61, 2], [62, 3], [5, 6]])
    for tokens in more:
        for row, own in zip(rows, session.decode(tokens), strict=True):
            row.append(own.copy())
    check_row(rows[0], SOURCES[3], [*opened.start, 60, *more[:, 0]], truth)
    check_row(rows[1], SOURCES[0], [*opened.start, 9, *more[:, 1]], truth)
    refused(lambda: session.keep([0, 2]), ShapeError, "rows: expected some of 0 to 1, got [0, 2]")
    refused(lambda: session.keep([]), ShapeError, "rows: expected some of 0 to 1, got []")
    for own, source in zip(session.prefill(SOURCES), SOURCES, strict=True):
        check_row([own], source, opened.start, truth)


def test_a_step_binds_nothing(opened: Seq2SeqModel, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Seq2SeqSession(opened, 20, batch=2)
    session.prefill(SOURCES[:2])
    names = []
    for method in ("bind_cpu_input", "bind_input", "bind_ortvalue_input", "bind_output"):
        monkeypatch.setattr(onnxruntime.IOBinding, method, lambda _, name, *__: names.append(name))
    logits = [session.decode([1, 2]) for _ in range(19)]
    assert names == []
    assert all(one is logits[0] for one in logits)


def test_what_is_copied_to_a_device_is_what_the_arrays_hold(
    opened: Seq2SeqModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers() -> list[np.ndarray]:
        session = Seq2SeqSession(opened, 8, batch=4)
        return [session.prefill(SOURCES).copy(), *(session.decode(own).copy() for own in FOLLOWING.T)]

    expected = answers()
    monkeypatch.setattr(seq2seq_session, "HostInputs", partial(HostInputs, copied=True))
    for own, other in zip(answers(), expected, strict=True):
        np.testing.assert_array_equal(own, other)


def test_a_program_that_does_not_tell_the_length_gets_the_same(opened: Seq2SeqModel) -> None:
    """Optimum hands back a present that has grown; the session tells how much of its buffer is filled."""
    tokens, mask = np.array([SOURCES[2]]), np.ones((1, 4), np.int64)
    session = Seq2SeqSession(opened, 9)
    logits, cache = prefilled(opened, tokens, mask)
    assert np.array_equal(session.prefill([SOURCES[2]]), logits[:, -1])
    names = [entry.name for entry in opened.later.get_outputs()]
    for token in (9, 30, 77, 8):
        own, *present = opened.later.run(
            None, {"input_ids": np.array([[token]]), "encoder_attention_mask": mask, **cache}
        )
        cache |= dict(zip(map(past, names[1:]), present, strict=True))
        assert np.array_equal(session.decode([token]), own[:, 0])
    assert cache["past_key_values.0.decoder.key"].shape[2] == 5


def past(name: str) -> str:
    return name.replace("present", "past_key_values")


def prefilled(
    model: Seq2SeqModel, tokens: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits of the decoder's first step, and all keys and values."""
    (states,) = model.encoder.run(None, {"input_ids": tokens, "attention_mask": mask})
    names = [entry.name for entry in model.first.get_outputs()]
    given = {"input_ids": np.array([model.start]), "encoder_attention_mask": mask}
    logits, *present = model.first.run(None, {**given, "encoder_hidden_states": states})
    return logits, dict(zip(map(past, names[1:]), present, strict=True))


def test_a_graph_that_reads_no_length_is_refused(folder: Path) -> None:
    model = ir.load(folder / ENCODER_FILE)
    refused(
        lambda: let_length_be_told(model, "input_ids"),
        TargetError,
        "input_ids: expected a node that reads its length, found none",
    )


def test_the_room_is_bounded_and_says_so(opened: Seq2SeqModel) -> None:
    larger = "; open the session with a larger capacity"
    session = Seq2SeqSession(opened, 2, batch=2)
    refused(lambda: session.decode([1, 2]), ShapeError, "tokens: expected a prefill before them, got none")
    session.prefill(SOURCES[:2])
    refused(lambda: session.decode([1]), ShapeError, "tokens: expected 2, one a row, got 1")
    session.decode([1, 2])
    refused(
        lambda: session.decode([1, 2]),
        ShapeError,
        f"tokens: expected at most 2 in a target, got one more{larger}",
    )
    refused(
        lambda: generate(session, SOURCES[:2], 3),
        ShapeError,
        f"capacity: expected at least 3 for a target's start and 3 new tokens, got 2{larger}",
    )
    refused(
        lambda: Seq2SeqSession(opened, 0),
        ConfigError,
        "capacity: expected at least 1, what a target begins with, got 0",
    )
    refused(lambda: Seq2SeqSession(opened, 1, batch=0), ConfigError, "batch: expected at least 1 row, got 0")


def test_sources_that_do_not_fit_are_refused(opened: Seq2SeqModel) -> None:
    session = Seq2SeqSession(opened, 4, batch=2)
    refused(
        lambda: session.prefill(SOURCES),
        ShapeError,
        "prompts: expected 2, one a row, got 4; open the session with batch=4",
    )
    for wrong in (-1, VOCABULARY):
        refused(
            lambda wrong=wrong: session.prefill([[1], [2, wrong]]),
            DataError,
            f"prompt 2: expected tokens from 0 to {VOCABULARY - 1}, got {wrong}; "
            "use the model's own tokenizer",
        )
    if opened.positions is None:  # relative positions
        session.prefill([[1] * 200, [2]])
        refused(
            lambda: session.prefill([[1], []]),
            ShapeError,
            "prompt 2: expected at least 1 token, got 0; give it some text",
        )
    else:
        assert opened.positions == 128
        for wrong in ([], [2] * 129):
            refused(
                lambda wrong=wrong: session.prefill([[1], wrong]),
                ShapeError,
                f"prompt 2: expected 1 to 128 tokens, got {len(wrong)}; shorten the text",
            )
        refused(
            lambda: Seq2SeqSession(opened, 129),
            ConfigError,
            "capacity: expected at most the model's 128 positions, got 129",
        )


def test_what_a_target_begins_with_is_read_from_the_folder(tmp_path: Path) -> None:
    generation, config = tmp_path / "generation_config.json", tmp_path / "config.json"
    refused(
        lambda: start_tokens(tmp_path),
        FileError,
        f"{tmp_path}: expected decoder_start_token_id in generation_config.json or config.json, found none",
    )
    config.write_text('{"bos_token_id": 5}')
    assert start_tokens(tmp_path) == (5,)
    config.write_text('{"bos_token_id": 5, "decoder_start_token_id": 6, "forced_bos_token_id": 0}')
    assert start_tokens(tmp_path) == (6, 0)
    generation.write_text('{"decoder_start_token_id": 7, "forced_bos_token_id": null}')
    assert start_tokens(tmp_path) == (7, 0)
    generation.write_text('{"decoder_start_token_id": [7]}')
    refused(
        lambda: start_tokens(tmp_path),
        FileError,
        f"{generation}: decoder_start_token_id: expected a token, got [7]",
    )


@pytest.mark.parametrize("file", GRAPHS)
def test_a_missing_graph_is_named(copied: Path, file: str) -> None:
    (copied / file).unlink()
    assert is_seq2seq(copied)
    refused(
        lambda: open_seq2seq(copied),
        FileError,
        f"{copied / file}: expected an exported model, found none; make one with `loracle export`",
    )


def test_graphs_in_each_others_place_are_refused(folder: Path, copied: Path) -> None:
    shutil.copy(copied / DECODER_FILE, copied / DECODER_WITH_PAST_FILE)
    refused(
        lambda: open_seq2seq(copied),
        FileError,
        f"{copied / DECODER_WITH_PAST_FILE}: expected inputs past_key_values.0.decoder.key and so on, "
        "found none; export with `loracle export`",
    )
    shutil.copy(copied / ENCODER_FILE, copied / DECODER_FILE)
    shutil.copy(folder / DECODER_WITH_PAST_FILE, copied / DECODER_WITH_PAST_FILE)
    refused(
        lambda: open_seq2seq(copied),
        FileError,
        f"{copied / DECODER_FILE}: attention_mask: expected the inputs and outputs of an exported encoder "
        "and decoder, got others; export with `loracle export`",
    )
    (copied / "config.json").write_text('{"max_position_embeddings": "many", "decoder_start_token_id": 1}')
    refused(
        lambda: open_seq2seq(copied),
        FileError,
        f"{copied / 'config.json'}: max_position_embeddings: expected a positive integer, got 'many'",
    )


def test_a_graph_without_the_input_for_the_length_is_refused(copied: Path) -> None:
    model = onnx.load(str(copied / DECODER_WITH_PAST_FILE), load_external_data=False)
    kept = [entry for entry in model.graph.input if entry.name != PAST_LENGTH]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    (copied / DECODER_WITH_PAST_FILE).write_bytes(model.SerializeToString())
    refused(
        lambda: open_seq2seq(copied),
        FileError,
        f"{copied / DECODER_WITH_PAST_FILE}: past_length: expected the inputs and outputs of an exported "
        "encoder and decoder, got others; export with `loracle export`",
    )


def test_generating_imports_no_torch(folder: Path) -> None:
    script = (
        "import sys\n"
        "from loracle.export import Seq2SeqSession, generate\n"
        f"session = Seq2SeqSession({str(folder)!r}, 8, batch=2)\n"
        "list(generate(session, [[1, 2], [3]], 4))\n"
        "print([name for name in ('torch', 'transformers', 'onnx', 'onnx_ir') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
