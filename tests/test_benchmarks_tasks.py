"""Many tasks side by side: what a process does, the order, the parity check, the figures, the result file."""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("onnxruntime_genai")

from export_fixtures import make_adapter, make_model

from benchmarks import decode_parity, interleaved, tasks, tasks_process
from benchmarks.answer import Answer
from benchmarks.decode_parity import Difference
from benchmarks.interleaved import Times
from benchmarks.process import resident_bytes
from benchmarks.tasks_folders import Folders, disk_bytes, tensor_bytes
from benchmarks.tasks_process import task_process
from benchmarks.tasks_report import STAY, TURNS, Held, checks, held_row, speed_row
from benchmarks.tasks_ways import BAKED, CONTROL, GENAI, INPUTS, LINKED, PEFT, SWAPPABLE, WAYS, Opening
from loracle.export import export

PROMPT = (5, 77, 30, 12)
MB = 10**6


def _opening(way: str) -> Opening:
    return Opening(way, "folder", "adapters", 1, 0)


def _folders(count: int) -> Folders:
    names = [f"t{number}" for number in range(count)]
    ways = (BAKED, *WAYS)
    return Folders(
        "base",
        "adapters",
        {way: way for way in ways},
        names,
        PROMPT,
        {way: [100 * (place + 1) + number for number in range(count)] for place, way in enumerate(ways)},
        base_bytes=1000,
        task_bytes=10,
        weight_bytes=900,
    )


def test_a_page_that_is_mapped_twice_is_resident_twice_but_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(40 * MB))
    before = resident_bytes()
    with path.open("rb") as file:
        maps = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) for _ in range(2)]
    for mapped in maps:
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
    after = resident_bytes()
    for mapped in maps:
        mapped.close()
    proportional, resident = (new - old for new, old in zip(after, before, strict=True))
    assert 39 * MB < proportional < 50 * MB
    assert 79 * MB < resident < 90 * MB


class _Way:
    """Takes 20 ms to get ready and says that an answer took one second; notes what is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def load(self, task: str) -> None:
        self.asked.append(("load", task))

    def ready(self, task: str, capacity: int) -> Callable[[Sequence[int], int], Answer]:
        self.asked.append((task, capacity))
        time.sleep(0.02)

        def run(prompt: Sequence[int], new_tokens: int) -> Answer:
            self.asked.append(task)
            return Answer(tuple(range(new_tokens)), 1.0, 5.0)

        return run


def test_getting_ready_is_part_of_an_answers_first_token() -> None:
    way = _Way()
    answer = tasks_process.answer_once(way, "a", PROMPT, 3)
    assert 1.02 <= answer.first < 2
    assert answer == Answer((0, 1, 2), answer.first, 5.0)
    assert way.asked == [("a", 7), "a"]


def test_a_switch_is_from_one_tasks_answer_to_the_next_task_ready() -> None:
    way = _Way()
    seconds = tasks_process.switch_seconds(way, ["a", "b"], PROMPT, 3)
    assert len(seconds) == 3
    assert all(0.02 <= one < 1 for one in seconds)
    capacity = len(PROMPT) + tasks_process.SWITCH_TOKENS
    assert way.asked == [("a", capacity), "a", ("b", capacity), "b", ("a", capacity), "a", ("b", capacity)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tasks") / "base")


@pytest.mark.slow
def test_a_process_answers_with_the_task_that_it_is_asked_for(base: Path, tmp_path: Path) -> None:
    texts = {}
    for seed, name in enumerate(("a", "b"), 1):
        adapter = make_adapter(tmp_path / "adapters" / name, base, seed=seed)
        export(base, tmp_path / "deployed", adapter, form="swappable", name=name)
        export(base, tmp_path / name, adapter)
        with task_process(Opening(BAKED, str(tmp_path), "", 1, 0)) as process:
            assert process.open() > 0
            process.load(name)
            texts[name] = process.answer(name, PROMPT, 8).tokens
    assert texts["a"] != texts["b"]
    with task_process(Opening(SWAPPABLE, str(tmp_path / "deployed"), "", 1, 0)) as process:
        before, _ = process.memory()
        process.open()
        assert min(process.load(name) for name in texts) > 0
        found = {name: process.answer(name, PROMPT, 8) for name in ("b", "a")}
        after, resident = process.memory()
        assert 0 < before < after <= resident
        assert len(process.switch(["a", "b"], PROMPT, 5)) == 5
    assert {name: answer.tokens for name, answer in found.items()} == texts
    assert all(answer.first > 0 and answer.rest > 0 for answer in found.values())


def test_a_process_that_fails_shows_why(tmp_path: Path) -> None:
    with (
        pytest.raises(SystemExit, match=r"(?s)^swappable, open: exit code 1\n.*expected an exported model"),
        task_process(Opening(SWAPPABLE, str(tmp_path), "", 1, 0)) as process,
    ):
        process.open()


class _Process:
    """Answers task `tN` of a way with N and a count of all answers; notes what is asked."""

    def __init__(self, way: str, log: list[Any], seconds: float = 1.0, constant: bool = True) -> None:
        self.way, self.log, self.seconds, self.constant = way, log, seconds, constant
        self.answered = 0

    def memory(self) -> tuple[int, int]:
        self.log.append("memory")
        return 100 + self.answered, 200 + self.answered

    def open(self) -> float:
        self.log.append("open")
        return 0.5

    def load(self, task: str) -> float:
        self.log.append(("load", task))
        return 0.25

    def answer(self, task: str, prompt: Sequence[int], new_tokens: int) -> Answer:
        self.log.append((self.way, task, new_tokens))
        self.answered += 1
        text = (int(task[1:]), 7, 0 if self.constant else self.answered)
        return Answer(text, self.seconds, 10 * self.seconds)

    def switch(self, names: Sequence[str], prompt: Sequence[int], samples: int) -> list[float]:
        self.log.append(("switch", len(names), samples))
        return [0.001] * samples


def _processes(monkeypatch: pytest.MonkeyPatch, log: list[Any], **options: Any) -> None:
    seconds = {BAKED: 1.0, CONTROL: 2.0, LINKED: 4.0}

    @contextmanager
    def process(opening: Opening) -> Iterator[_Process]:
        log.append(("process", opening.way, opening.unused))
        yield _Process(opening.way, log, seconds.get(opening.way, 1.0), **options)

    monkeypatch.setattr(tasks, "task_process", process)


def test_memory_is_taken_before_a_model_is_open_and_when_every_task_has_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[Any] = []
    _processes(monkeypatch, log)
    held = tasks.hold(_opening(BAKED), ["t0", "t1"], PROMPT, 3, 5)
    answers = [(BAKED, "t0", 3), (BAKED, "t1", 3)]
    loads = [("load", "t0"), ("load", "t1")]
    assert log[1:] == ["memory", "open", *loads, *answers, "memory", ("switch", 2, 5), answers[0]]
    texts = [(0, 7, 0), (1, 7, 0)]
    assert held == Held(100, 102, 202, 0.5, [0.25] * 2, [1.0] * 2, [0.001] * 5, texts)


def test_a_task_that_other_tasks_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _processes(monkeypatch, [], constant=False)
    with pytest.raises(SystemExit, match="linked: t0 answers otherwise after other tasks"):
        tasks.hold(_opening(LINKED), ["t0"], PROMPT, 3, 5)


def test_baked_comes_first_and_the_others_get_a_token_that_it_never_chooses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[Any] = []
    _processes(monkeypatch, log)
    said: list[str] = []
    held = tasks.hold_all(_folders(2), [LINKED], [1, 2], 1, said.append)
    opened = [entry for entry in log if entry[0] == "process"]
    assert opened == [("process", BAKED, -1)] * 2 + [("process", LINKED, 2)] * 2  # 0, 1 and 7 are chosen
    assert list(held) == [(BAKED, 2), (BAKED, 1), (LINKED, 2), (LINKED, 1)]
    assert [len(one.texts) for one in held.values()] == [2, 1, 2, 1]
    assert said == [BAKED, LINKED]


def test_tasks_that_answer_the_same_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _processes(monkeypatch, [])
    monkeypatch.setattr(_Process, "answer", lambda self, *_: Answer((1, 2), 1.0, 1.0))
    with pytest.raises(SystemExit, match="expected tasks that answer differently"):
        tasks.hold_all(_folders(2), [], [2], 1, lambda line: None)
    assert len(tasks.hold_all(_folders(2), [], [1], 1, lambda line: None)) == 1


def test_every_text_is_held_against_the_same_task_baked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def differences(base: Path, adapter: Path, texts: Any, others: Any) -> Any:
        asked.append((str(base), str(adapter), texts, others))
        return {key: Difference(3, 0.5, 1.0) for key in others if key[0] == "linked, 2 tasks"}

    monkeypatch.setattr(decode_parity, "differences", differences)

    def held(*texts: tuple[int, ...]) -> Held:
        return Held(0, 0, 0, 0.0, [0.0], [0.0], [0.0], list(texts))

    found = tasks.check_parity(
        _folders(2),
        {
            (BAKED, 2): held((1,), (2,)),
            (BAKED, 1): held((3,)),
            (LINKED, 2): held((4,), (5,)),
            (LINKED, 1): held((6,)),
        },
    )
    names = ("baked, 2 tasks", "baked, 1 tasks", "linked, 2 tasks", "linked, 1 tasks")
    first = dict(zip(((name, PROMPT) for name in names), ((1,), (3,), (4,), (6,)), strict=True))
    second = {(names[0], PROMPT): (2,), (names[2], PROMPT): (5,)}
    assert asked == [
        ("base", "adapters/t0", {PROMPT: (1,)}, first),
        ("base", "adapters/t1", {PROMPT: (2,)}, second),
    ]
    explained = {"way": LINKED, "tasks": 2, "place": 3, "margin": 0.5, "limit": 1.0}
    assert found == [{**explained, "task": "t0"}, {**explained, "task": "t1"}]


def test_ways_stand_beside_baked_and_every_second_round_turns_back(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    _processes(monkeypatch, log)
    monkeypatch.setattr(tasks, "read_bandwidth", lambda threads: 5.0)
    timing = tasks.Timing(PROMPT, 9, 2, 1)
    times, bandwidths = tasks.measure(_opening, [CONTROL, LINKED], ["t0", "t1"], [2], timing)
    assert bandwidths == [5.0, 5.0]
    opened = [entry[1] for entry in log if entry[0] == "process"]
    assert opened == [BAKED, CONTROL, LINKED, BAKED, LINKED, CONTROL]
    assert times == {
        (BAKED, 2, STAY): Times([1.0, 1.0], [10.0, 10.0]),
        (BAKED, 2, TURNS): Times([1.0, 1.0], [10.0, 10.0]),
        (CONTROL, 2, STAY): Times([2.0, 2.0], [20.0, 20.0], [2.0, 2.0], [2.0, 2.0]),
        (CONTROL, 2, TURNS): Times([2.0, 2.0], [20.0, 20.0], [2.0, 2.0], [2.0, 2.0]),
        (LINKED, 2, STAY): Times([4.0, 4.0], [40.0, 40.0], [4.0, 4.0], [4.0, 4.0]),
        (LINKED, 2, TURNS): Times([4.0, 4.0], [40.0, 40.0], [4.0, 4.0], [4.0, 4.0]),
    }
    warm = interleaved.WARM_TOKENS
    at = log.index(("process", CONTROL, 0))
    # Loaded, and each task warm; then all by one task, O X X O; then the next task for every answer.
    assert log[at + 1 : at + 6] == [
        "open",
        ("load", "t0"),
        ("load", "t1"),
        (CONTROL, "t0", warm),
        (CONTROL, "t1", warm),
    ]
    timed = log[at + 6 : at + 22]
    order = [BAKED, CONTROL, CONTROL, BAKED]
    assert timed[:8] == [(way, "t0", tokens) for way in order for tokens in (warm, 9)]
    assert timed[8:] == [(way, task, tokens) for way in order for task, tokens in (("t0", warm), ("t1", 9))]
    stay = {entry[1] for entry in log[-16:-8]}
    assert stay == {"t1"}  # the second round's task


def test_one_task_has_no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    _processes(monkeypatch, [])
    monkeypatch.setattr(tasks, "read_bandwidth", lambda threads: 5.0)
    times, _ = tasks.measure(_opening, [LINKED], ["t0", "t1"], [1, 2], tasks.Timing(PROMPT, 9, 1, 1))
    assert list(times) == [
        (way, count, mode) for count, mode in ((1, STAY), (2, STAY), (2, TURNS)) for way in (BAKED, LINKED)
    ]


def test_what_folders_and_tensors_take(base: Path, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(bytes(7))
    (tmp_path / "b").write_bytes(bytes(5))
    assert disk_bytes(tmp_path) == 12
    assert disk_bytes(tmp_path, tmp_path / "inner") == 19
    hidden, inner, queries, keys = 48, 80, 64, 32
    layer = 2 * queries * hidden + 2 * keys * hidden + 3 * inner * hidden + 2 * hidden
    assert tensor_bytes(base) == 4 * (2 * layer + hidden + 264 * hidden)
    assert tensor_bytes(base, ("q_proj", "v_proj")) == 4 * 2 * (queries + keys) * hidden
    assert _folders(3).floor(3) == 1030


def test_a_row_of_memory_is_what_has_grown() -> None:
    held = Held(100, 350, 500, 9.0, [3.0, 1.0, 2.0], [4.0] * 3, [0.2, 0.4, 0.3], [(1,)])
    row = held_row(LINKED, 3, held, disk=70, floor=60)
    assert (row["memory_bytes"], row["memory_after_bytes"], row["resident_after_bytes"]) == (250, 350, 500)
    assert (row["load_seconds"], row["switch_seconds"]) == (2.0, 0.3)
    assert row["switch_interval"] == (0.2, 0.4, 0.75)
    assert (row["disk_bytes"], row["floor_bytes"], row["open_seconds"]) == (70, 60, 9.0)


def test_a_row_of_speeds_is_over_bakeds() -> None:
    times = Times([1.0, 3.0, 2.0], [2.0, 4.0, 8.0], [1.0, 2.0, 4.0], [0.5, 1.0, 4.0])
    row = speed_row(LINKED, 8, TURNS, times, (20, 5), weight_bytes=6, bandwidths=[12.0, 12.0, 1.0])
    assert row["decode_tokens_per_second"] == 1.0
    assert row["prefill_tokens_per_second"] == 10.0
    # 4 steps of 6 bytes in 2, 4, 8 seconds: 12, 6, 3 bytes a second.
    assert row["share"] == 1.0
    assert (row["prefill_ratio"], row["decode_ratio"]) == (0.5, 1.0)
    assert row["decode_interval"] == (0.25, 2.0, 0.75)
    own = speed_row(BAKED, 8, STAY, replace(times, decode_ratios=[]), (20, 5), 6, [1.0] * 3)
    assert own["decode_ratio"] is None


def test_the_aims_are_of_swappable_tasks() -> None:
    def aims(memory: int, switch: float, speed: float) -> list[tuple[str, bool]]:
        held = [
            {
                "way": way,
                "tasks": 2,
                "memory_bytes": memory if way == SWAPPABLE else 10**9,
                "floor_bytes": 500,
                "switch_seconds": switch,
            }
            for way in (BAKED, SWAPPABLE)
        ]
        rows = [{"way": way, "tasks": 2, "mode": TURNS, "decode_ratio": speed} for way in (BAKED, SWAPPABLE)]
        return [(check["check"], check["holds"]) for check in checks(held, rows, 400)]

    names = ["memory, MB", "switch, ms", "decode over baked, in turn"]
    assert aims(540, 1e-3, 0.95) == [(name, True) for name in names]
    assert aims(541, 1.01e-3, 0.949) == [(name, False) for name in names]


@pytest.mark.slow
def test_the_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "tasks.json"
    ways = [CONTROL, SWAPPABLE, INPUTS, GENAI, PEFT]
    tasks.main(["--quick", "--threads", "1", "--ways", *ways, "--out", str(out)])
    result = json.loads(out.read_text())
    peers = [BAKED, *ways[1:]]
    assert [(row["tasks"], row["way"]) for row in result["memory"]] == [
        (count, way) for count in (1, 2) for way in peers
    ]
    assert [(row["tasks"], row["mode"], row["way"]) for row in result["speed"]] == [
        (count, mode, way) for count, mode in ((1, STAY), (2, STAY), (2, TURNS)) for way in (BAKED, *ways)
    ]
    assert result["different_answers"] == 2
    disk = {(row["way"], row["tasks"]): row["disk_bytes"] for row in result["memory"]}
    for way in (SWAPPABLE, INPUTS):
        assert result["base_bytes"] < disk[way, 1] < disk[way, 2] < 1.3 * disk[way, 1]
    assert 1.9 < disk[BAKED, 2] / disk[BAKED, 1] <= 2
    assert disk[GENAI, 2] == disk[INPUTS, 2]
    assert len(result["checks"]) == 2 + 2 + 3
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "swappable" in printed


def test_impossible_lengths_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--tokens", "1"], "expected at least 2, got 1"),
        (["--counts", "0", "2"], "expected at least 1 task, got 0"),
        (["--speeds", "-3"], "expected at least 1 task, got -3"),
    ):
        with pytest.raises(SystemExit):
            tasks.main(arguments)
        assert said in capsys.readouterr().err
