"""The decoder session: batches, masks, capacity, and what a step binds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from export_fixtures import VOCABULARY, make_model
from onnx import TensorProto, helper
from refusal import refused

from loracle.export import DecoderSession, export, open_session
from loracle.export import session as session_module
from loracle.export.context import context_length
from loracle.export.host_inputs import HostInputs
from loracle.export.names import GRAPH_FILE, LOGITS_TO_KEEP
from loracle.export.verification.truth import Float64Model
from loracle.reference import ConfigError, DataError, FileError, ShapeError

CONTEXT = 512
PROMPTS = ([5, 77, 30, 12, 90, 41, 3], [8], [200, 100, 50, 20], [17, 4])
FOLLOWING = np.array([[9, 30, 77], [1, 2, 3], [250, 249, 248], [60, 61, 62]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("session") / "base")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return folder


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    export(base, base.parent / "onnx")
    return base.parent / "onnx"


@pytest.fixture(scope="module")
def opened(folder: Path) -> onnxruntime.InferenceSession:
    return open_session(folder, threads=1)


@pytest.fixture(scope="module")
def truth(base: Path) -> Float64Model:
    return Float64Model(base, None)


def check_row(logits: Sequence[np.ndarray], tokens: Sequence[int], truth: Float64Model) -> None:
    """Logits of the last positions of a text lie inside the derived bound of the float64 model."""
    (right,) = truth.evaluate([tokens], np.dtype(np.float32))
    assert np.abs(np.stack(logits) - right.logits[-len(logits) :]).max() <= right.tolerance


def test_each_row_of_a_batch_is_its_text_alone(
    opened: onnxruntime.InferenceSession, truth: Float64Model
) -> None:
    """Prompts of all lengths, then steps; a second batch in the same session sees nothing of the first."""
    session = DecoderSession(opened, 12, batch=4)
    for prompts in (PROMPTS, PROMPTS[::-1]):
        rows = [[own] for own in session.prefill(prompts).copy()]
        for tokens in FOLLOWING.T:
            for row, own in zip(rows, session.decode(tokens), strict=True):
                row.append(own.copy())
        for row, prompt, following in zip(rows, prompts, FOLLOWING, strict=True):
            check_row(row, [*prompt, *following], truth)
        assert session.length == 10


def test_a_row_may_fill_the_capacity_past_every_widening_of_the_mask(
    opened: onnxruntime.InferenceSession, truth: Float64Model
) -> None:
    """Steps alone and after prompts that end just before, at and just after a widening."""
    text = np.random.default_rng(0).integers(0, VOCABULARY, 300)
    for start in (0, 127, 128, 129):
        session = DecoderSession(opened, 300)
        logits = list(session.step(text[:start])) if start else []
        logits += [session.step(text[at : at + 1])[0].copy() for at in range(start, 300)]
        check_row(logits, text.tolist(), truth)


def test_rows_of_different_lengths_pass_a_widening_together(
    opened: onnxruntime.InferenceSession, truth: Float64Model
) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, VOCABULARY, size).tolist() for size in (126, 3)]
    following = rng.integers(0, VOCABULARY, (5, 2))
    session = DecoderSession(opened, 131, batch=2)
    rows = [[own] for own in session.prefill(prompts).copy()]
    for tokens in following:
        for row, own in zip(rows, session.decode(tokens), strict=True):
            row.append(own.copy())
    for number in range(2):
        check_row(rows[number], [*prompts[number], *following[:, number]], truth)


def test_rows_that_are_kept_go_on_as_they_were(
    opened: onnxruntime.InferenceSession, truth: Float64Model
) -> None:
    """In another order, without the longest, whose room is free again; a reset brings all rows back."""
    session = DecoderSession(opened, 9, batch=4)
    session.prefill(PROMPTS)
    session.decode(FOLLOWING[:, 0])
    session.keep([3, 1])
    assert (session.rows, session.length) == (2, 3)
    rows: list[list[np.ndarray]] = [[], []]
    more = np.array([[61, 2], [62, 3], [5, 6], [7, 8], [9, 10], [11, 12]])
    for tokens in more:
        for row, own in zip(rows, session.decode(tokens), strict=True):
            row.append(own.copy())
    assert session.length == 9
    check_row(rows[0], [17, 4, 60, *more[:, 0]], truth)
    check_row(rows[1], [8, 1, *more[:, 1]], truth)
    refused(lambda: session.keep([0, 2]), ShapeError, "rows: expected some of 0 to 1, got [0, 2]")
    refused(lambda: session.keep([]), ShapeError, "rows: expected some of 0 to 1, got []")
    first = session.prefill(PROMPTS)
    for own, prompt in zip(first, PROMPTS, strict=True):
        check_row([own], prompt, truth)


def test_pieces_of_a_text_give_the_logits_of_the_whole(
    opened: onnxruntime.InferenceSession, truth: Float64Model
) -> None:
    session = DecoderSession(opened, 16)
    prompt = PROMPTS[0]
    for cuts in ((0, 7), (0, 1, 4, 5, 7), (0, 3, 4, 7), (0, 1, 2, 7)):
        session.reset()
        pieces = [session.step(np.array(prompt[begin:end])).copy() for begin, end in pairwise(cuts)]
        check_row(list(np.concatenate(pieces)), prompt, truth)


def test_a_prompt_copies_back_the_last_logits_alone(
    opened: onnxruntime.InferenceSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    bound = onnxruntime.IOBinding.bind_output

    def recording(self: object, name: str, *place: object) -> None:
        shapes.append(place[3])
        bound(self, name, *place)

    session = DecoderSession(opened, 12, batch=2)
    monkeypatch.setattr(onnxruntime.IOBinding, "bind_output", recording)
    assert session.prefill(PROMPTS[:2]).shape == (2, VOCABULARY)
    assert shapes == [[2, 1, VOCABULARY]]


def test_a_graph_without_the_input_for_the_last_logits_gives_the_same(
    folder: Path, tmp_path: Path, truth: Float64Model
) -> None:
    """Exports of other tools have none: all logits are copied and the last taken."""
    model = onnx.load(str(folder / GRAPH_FILE))
    kept = [entry for entry in model.graph.input if entry.name != LOGITS_TO_KEEP]
    assert len(kept) == len(model.graph.input) - 1
    del model.graph.input[:]
    model.graph.input.extend(kept)
    onnx.save(model, str(tmp_path / GRAPH_FILE))
    session = DecoderSession(tmp_path, 12, batch=4, threads=1)
    rows = [[own] for own in session.prefill(PROMPTS).copy()]
    for row, own in zip(rows, session.decode(FOLLOWING[:, 0]), strict=True):
        row.append(own)
    for row, prompt, following in zip(rows, PROMPTS, FOLLOWING, strict=True):
        check_row(row, [*prompt, following[0]], truth)


def test_a_step_binds_nothing_but_where_the_mask_is_widened(
    opened: onnxruntime.InferenceSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []

    def record(method: str) -> None:
        bound = getattr(onnxruntime.IOBinding, method)

        def recording(self: object, name: str, *place: object) -> None:
            names.append(name)
            bound(self, name, *place)

        monkeypatch.setattr(onnxruntime.IOBinding, method, recording)

    session = DecoderSession(opened, 300, batch=2)
    session.prefill(PROMPTS[:2])
    first = session.decode([1, 2])  # binds what every step reads and writes
    for method in (
        "bind_cpu_input",
        "bind_input",
        "bind_ortvalue_input",
        "bind_output",
        "bind_ortvalue_output",
    ):
        record(method)
    logits = [session.decode([1, 2]) for _ in range(292)]
    assert names == ["attention_mask"] * 2  # of 256 and 300 columns, after 128
    assert all(one is first for one in logits)


def test_what_is_copied_to_a_device_is_what_the_arrays_hold(
    opened: onnxruntime.InferenceSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps, a widening of the mask, and another prompt, through memory that is bound in their place."""
    text = np.random.default_rng(3).integers(0, VOCABULARY, (2, 140))

    def answers() -> list[np.ndarray]:
        session = DecoderSession(opened, 160, batch=2)
        found = []
        for start in (120, 4):
            found.append(session.prefill(list(text[:, :start])).copy())
            found += [session.decode(tokens).copy() for tokens in text[:, start:].T]
        return found

    expected = answers()
    monkeypatch.setattr(session_module, "HostInputs", partial(HostInputs, copied=True))
    for own, other in zip(answers(), expected, strict=True):
        np.testing.assert_array_equal(own, other)


def test_the_capacity_is_bounded_and_says_so(opened: onnxruntime.InferenceSession) -> None:
    session = DecoderSession(opened, 4)
    room = "; open the session with a larger capacity"
    session.step(np.array([1, 2, 3]))
    refused(
        lambda: session.step(np.array([4, 5])),
        ShapeError,
        f"input_ids: expected 1 to 1 more tokens, got 2{room}",
    )
    refused(
        lambda: session.step(np.array([], np.int64)),
        ShapeError,
        f"input_ids: expected 1 to 1 more tokens, got 0{room}",
    )
    assert session.step(np.array([4])).shape == (1, session.vocabulary)
    refused(lambda: session.decode([5]), ShapeError, f"input_ids: expected 1 to 0 more tokens, got 1{room}")
    pair = DecoderSession(opened, 4, batch=2)
    refused(
        lambda: pair.prefill([[1], [2] * 5]), ShapeError, f"prompt 2: expected 1 to 4 tokens, got 5{room}"
    )
    refused(lambda: pair.prefill([[1], []]), ShapeError, f"prompt 2: expected 1 to 4 tokens, got 0{room}")


def test_what_does_not_fit_the_rows_is_refused(opened: onnxruntime.InferenceSession) -> None:
    session = DecoderSession(opened, 4, batch=2)
    refused(
        lambda: session.prefill([[1], [2], [3]]),
        ShapeError,
        "prompts: expected 2, one a row, got 3; open the session with batch=3",
    )
    refused(
        lambda: session.step(np.array([1])),
        ShapeError,
        "step: expected a session of one row, got 2; use prefill and decode",
    )
    session.prefill([[1], [2]])
    refused(lambda: session.decode([1]), ShapeError, "tokens: expected 2, one a row, got 1")
    for wrong in (-1, VOCABULARY):
        refused(
            lambda wrong=wrong: session.prefill([[1], [2, wrong]]),
            DataError,
            f"prompt 2: expected tokens from 0 to {VOCABULARY - 1}, got {wrong}; "
            "use the model's own tokenizer",
        )
    refused(lambda: DecoderSession(opened, 0), ConfigError, "capacity: expected at least 1 token, got 0")
    refused(lambda: DecoderSession(opened, 1, batch=0), ConfigError, "batch: expected at least 1 row, got 0")


def test_a_refused_prompt_leaves_the_texts_as_they_are(
    opened: onnxruntime.InferenceSession, truth: Float64Model
) -> None:
    session = DecoderSession(opened, 8, batch=2)
    session.prefill([[5, 77], [8]])
    with pytest.raises(DataError):
        session.prefill([[5], [-1]])
    check_row([session.decode([30, 9])[0]], [5, 77, 30], truth)


def test_the_context_is_read_from_the_folder_and_not_exceeded(folder: Path, tmp_path: Path) -> None:
    assert context_length(folder) == CONTEXT
    assert context_length(tmp_path) is None
    refused(
        lambda: DecoderSession(folder, CONTEXT + 1),
        ConfigError,
        f"capacity: expected at most the model's context of {CONTEXT} tokens, got {CONTEXT + 1}",
    )
    path = tmp_path / "genai_config.json"
    path.write_text('{"model": {}}')
    assert context_length(tmp_path) is None
    path.write_text('{"model": {"context_length": "many"}}')
    refused(
        lambda: context_length(tmp_path),
        FileError,
        f"{path}: model.context_length: expected a positive integer, got 'many'",
    )


def graph_with(folder: Path, names: Sequence[str], kind: int = TensorProto.FLOAT) -> Path:
    """A model with these inputs and the outputs of a decoder of one layer."""
    shape = ["a", 2, "b", 16]
    integers = [name for name in names if not name.startswith("past")]
    inputs = [
        helper.make_tensor_value_info(
            name, TensorProto.INT64 if name in integers else kind, shape[:2] if name in integers else shape
        )
        for name in names
    ]
    outputs = [
        helper.make_tensor_value_info(f"present.0.{part}", kind, shape) for part in ("key", "value")
    ] + [helper.make_tensor_value_info("logits", kind, shape)]
    nodes = [
        helper.make_node("Identity", [source], [output.name])
        for source in [name for name in names if name not in integers][:1]
        for output in outputs
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), str(folder / GRAPH_FILE))
    return folder


def test_graphs_that_a_session_cannot_run_are_refused(tmp_path: Path) -> None:
    past = ["past_key_values.0.key", "past_key_values.0.value"]
    graph_with(tmp_path, ["input_ids", *past])
    refused(
        lambda: DecoderSession(tmp_path, 4),
        FileError,
        "attention_mask: expected among the model's inputs and outputs, found none; "
        "is this a decoder with a key-value cache?",
    )
    graph_with(tmp_path, ["input_ids", "attention_mask", *past, "position_ids"])
    refused(
        lambda: DecoderSession(tmp_path, 4),
        FileError,
        "position_ids: expected no input but tokens, mask and cache, found one; export with `loracle export`",
    )
    graph_with(tmp_path, ["input_ids", "attention_mask", *past], TensorProto.DOUBLE)
    refused(
        lambda: DecoderSession(tmp_path, 4),
        FileError,
        "past_key_values.0.key: expected one of tensor(float), tensor(float16), got tensor(double); "
        "export in fp32 or fp16",
    )


def test_generating_imports_no_torch(folder: Path) -> None:
    script = (
        "import sys\n"
        "from loracle.export import DecoderSession, Sampling, TextModel, generate\n"
        f"text = TextModel({str(folder)!r})\n"
        f"session = DecoderSession({str(folder)!r}, 16, batch=2)\n"
        "list(generate(session, [[1, 2], [3]], 4, sampling=Sampling(1.0, 5, 0.9)))\n"
        "print([name for name in ('torch', 'transformers', 'onnx', 'onnx_ir') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_file_that_onnxruntime_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / GRAPH_FILE).write_bytes(b"no graph")
    with pytest.raises(FileError, match=f"^{tmp_path / GRAPH_FILE}: onnxruntime refuses it: ") as caught:
        open_session(tmp_path)
    assert "\n" not in str(caught.value)
