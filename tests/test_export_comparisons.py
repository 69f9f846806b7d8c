"""Comparisons made in other processes are those made here, and failures there are errors here."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loracle.export.verification import comparisons as module
from loracle.export.verification import judge
from loracle.export.verification.comparison import compare
from loracle.export.verification.comparisons import Comparisons, Held, Setup, comparable, serve
from loracle.export.verification.one_weight import weight_of
from loracle.export.verification.verify import verify
from loracle.files import Checkpoint, MergedWeights
from loracle.files.mapped_view import MappedView
from loracle.reference import CheckError, NonFiniteError
from tests.export_fixtures import make_adapter, make_model
from tests.files_fixtures import Q0, V0, small_adapter, small_tensors, write_model

Q, V = f"{Q0}.weight", f"{V0}.weight"


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """Who waits for an answer that never comes uses no processor time, so no other limit ends it."""

    def too_long(*_: object) -> None:
        raise TimeoutError("a comparison does not come")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Case:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = Checkpoint(write_model(folder / "base", [small_tensors()]))
        self.weights = MergedWeights(self.checkpoint, small_adapter())

    def held(self, name: str, array: Any, *, turned: bool = False) -> Held:
        """The array in a file of its own, as somebody's tensor of that name."""
        path = self.folder / f"{len(list(self.folder.iterdir()))}.data"
        stored = np.ascontiguousarray(array.T) if turned else array
        path.write_bytes(b"12345" + stored.tobytes())
        view = MappedView.within(stored.T if turned else stored, stored, path, 5)
        assert view is not None
        return Held(name, view)


def overflowing(case: Case) -> tuple[Checkpoint, Held]:
    """A base whose merge overflows the dtype in which somebody holds a weight."""
    tensors = small_tensors()
    tensors[Q] = np.full_like(tensors[Q], 1e30)
    checkpoint = Checkpoint(write_model(case.folder / "large", [tensors]))
    return checkpoint, case.held(Q, np.ones(tensors[Q].shape, np.float16))


def sent(*values: object) -> io.BytesIO:
    """What a process reads that is sent the values."""
    return io.BytesIO(b"".join(map(pickle.dumps, values)))


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(module, "_OWN_BYTES", 0)
    return Case(tmp_path)


def test_comparisons_are_those_made_here(case: Case) -> None:
    right = np.array(case.weights.tensor(Q))
    damaged = right.copy()
    damaged[1, 2] *= 3
    held = [
        case.held(Q, right),
        case.held(Q, damaged),
        case.held(Q, right, turned=True),
        case.held(Q, case.weights.tensor(Q, np.dtype(np.float16))),
        case.held(V, case.checkpoint.tensor(V)),
        case.held(V, np.full_like(right, np.nan)[: len(case.checkpoint.tensor(V))]),
        *(case.held(name, case.checkpoint.tensor(name)) for name in case.checkpoint.names),
    ]
    with Comparisons(case.weights, held, processes=2, large=0) as ahead:
        for one in reversed(held):
            expected = compare(weight_of(case.weights, one.name), one.view.open())
            assert repr(ahead.of(one)) == repr(expected)  # NaN is not equal to itself
        assert ahead.of(held[1]).unequal == 1
        assert ahead.of(Held(V, held[0].view)) is None
    assert all(process.poll() is not None for process in ahead._running)
    assert len(ahead._running) == 2
    with Comparisons(case.weights, held, processes=1, large=0) as ahead:
        assert len(ahead._running) == 1
        assert all(thread.daemon for thread in ahead._threads)  # they do not outlive a program that ends


def test_few_bytes_are_not_worth_a_process(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    held = case.held(Q, case.weights.tensor(Q))
    for large, smallest in ((held.view.nbytes + 1, 0), (0, held.view.nbytes + 1), (None, 0)):
        monkeypatch.setattr(module, "_OWN_BYTES", smallest)
        with Comparisons(case.weights, [held], large=large) as ahead:
            assert ahead.of(held) is None
            assert not ahead._running
    monkeypatch.setattr(module, "_OWN_BYTES", held.view.nbytes)
    with Comparisons(case.weights, [held], large=held.view.nbytes) as ahead:
        assert len(ahead._running) == 1


def test_an_overflow_of_the_merge_is_the_error_that_it_is_here(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_OWN_BYTES", 0)
    checkpoint, held = overflowing(Case(tmp_path))
    weights = MergedWeights(checkpoint, small_adapter())
    with pytest.raises(NonFiniteError) as expected:
        compare(weight_of(weights, Q), held.view.open())
    with Comparisons(weights, [held], large=0) as ahead, pytest.raises(NonFiniteError) as got:
        ahead.of(held)
    assert str(got.value) == str(expected.value)


def running(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.parametrize("program", ["pass", "import sys; sys.stdin.buffer.read(1); sys.exit(3)"])
def test_a_process_that_ends_too_soon_is_an_error(case: Case, monkeypatch: Any, program: str) -> None:
    monkeypatch.setattr(module, "_started", lambda: running(program))
    held = [case.held(name, case.checkpoint.tensor(name)) for name in case.checkpoint.names]
    with Comparisons(case.weights, held, processes=1, large=0) as ahead:
        for one in held:
            with pytest.raises(CheckError, match=r"has ended with code [03]; is there too little memory"):
                ahead.of(one)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_answer_that_cannot_be_read_is_not_waited_for(case: Case, monkeypatch: Any) -> None:
    program = (
        "import sys; sys.stdout.buffer.write(b'cno_such_module\\nname\\n.'); sys.stdout.flush(); input()"
    )

    monkeypatch.setattr(module, "_started", lambda: running(program))
    held = [case.held(name, case.checkpoint.tensor(name)) for name in case.checkpoint.names]
    with Comparisons(case.weights, held, processes=1, large=0) as ahead:
        for one in held:
            with pytest.raises(CheckError, match="no process has compared it"):
                ahead.of(one)


def test_processes_end_with_an_exception_here(case: Case) -> None:
    held = [case.held(name, case.checkpoint.tensor(name)) for name in case.checkpoint.names]
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), Comparisons(case.weights, held, large=0) as ahead:
        raise KeyboardInterrupt
    assert ahead._running
    assert all(process.poll() is not None for process in ahead._running)
    assert threading.active_count() == before


def test_only_mapped_weights_of_the_right_shape_are_compared_ahead(case: Case) -> None:
    view = case.held(Q, case.weights.tensor(Q)).view
    wrong = case.held(Q, case.weights.tensor(Q)[1:]).view
    codes = case.held(Q, np.zeros(view.shape, np.int8)).view
    given = [(Q, view), (Q, None), (Q, wrong), (Q, codes)]
    assert comparable(case.weights, given) == [Held(Q, view)]


def test_a_process_answers_each_in_turn_until_there_are_no_more(case: Case) -> None:
    held = case.held(Q, case.weights.tensor(Q))
    sink = io.BytesIO()
    serve(sent(Setup(case.checkpoint.dir, case.weights.adapter), held, held), sink)
    expected = compare(weight_of(case.weights, Q), held.view.open())
    assert sink.getvalue() == pickle.dumps(expected) * 2


def test_a_process_reads_ahead_in_one_thread_and_expects_what_it_reads(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, threads, expected = [], [], []
    open_view, expect = MappedView.open, Checkpoint.expect

    class Recorded(MergedWeights):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            threads.append(options["threads"])
            super().__init__(*arguments, **options)

    monkeypatch.setattr(module, "MergedWeights", Recorded)
    monkeypatch.setattr(
        MappedView, "open", lambda view, *, soon=False: opened.append(soon) or open_view(view, soon=soon)
    )
    monkeypatch.setattr(
        Checkpoint, "expect", lambda own, name, *rest: expected.append(name) or expect(own, name, *rest)
    )
    held = case.held(Q, case.weights.tensor(Q))
    serve(sent(Setup(case.checkpoint.dir, case.weights.adapter), held), io.BytesIO())
    assert (opened, threads, expected) == ([True], [1], [Q])


def test_a_process_answers_with_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, held = overflowing(Case(tmp_path))
    sink = io.BytesIO()
    serve(sent(Setup(checkpoint.dir, small_adapter()), held), sink)
    answer = pickle.loads(sink.getvalue())  # noqa: S301
    assert isinstance(answer, NonFiniteError)
    assert Q in str(answer)


def test_a_process_is_started_in_a_group_of_its_own_with_the_modules_of_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(
        module.subprocess, "Popen", lambda *given, **options: started.append((given, options))
    )
    monkeypatch.setattr(sys, "path", ["/here", "", "/there"])
    module._started()
    (((command,), options),) = started
    assert command == [sys.executable, "-m", "loracle.export.verification.compare_process"]
    assert options["process_group"] == 0
    assert options["env"] == {**os.environ, "PYTHONPATH": f"/here{os.pathsep}/there"}


def test_what_a_process_that_has_ended_is_sent_is_the_error() -> None:
    class Closed(io.BytesIO):
        def write(self, data: Any) -> int:
            raise BrokenPipeError

    with running("import sys; sys.exit(7)") as process:
        error = module._sent(process, Closed(), "value")
    assert error is not None
    assert "has ended with code 7" in str(error)


@pytest.mark.parametrize("kind", ["export", pytest.param("foreign", marks=pytest.mark.slow), "checkpoint"])
def test_verify_says_the_same_with_processes_and_compares_nothing_itself(
    tmp_path: Path, monkeypatch: Any, kind: str
) -> None:
    from loracle.export import export
    from loracle.files import write_merged_checkpoint

    model = make_model(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter", model)
    out = tmp_path / "out"
    if kind == "export":
        export(model, out, adapter)
    else:
        write_merged_checkpoint(model, adapter, out)
    if kind == "foreign":
        from tests.foreign_graphs import torch_export

        out = torch_export(out, tmp_path / "onnx")
    plain = verify(out, model, adapter, outputs=False)
    monkeypatch.setattr(module, "_OWN_BYTES", 0)
    monkeypatch.setattr(module, "LARGE_BYTES", 0)
    here = []
    monkeypatch.setattr(
        judge, "compare", lambda weight, held: here.append(weight.name) or compare(weight, held)
    )
    ahead = verify(out, model, adapter, outputs=False)
    assert ahead == plain
    assert ahead.passed
    assert not [name for name in here if "proj" in name or "embed" in name]
