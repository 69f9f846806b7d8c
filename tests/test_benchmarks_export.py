"""The side-by-side exports: what is measured of a process, the models, the order, the judgement, the file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft")
pytest.importorskip("onnxruntime_genai")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks import export, export_parity, llama_model
from benchmarks.export_models import LARGE, MIDDLE, MODELS, SMOL
from benchmarks.export_parity import Judge
from benchmarks.export_report import checks, rows_of
from benchmarks.export_ways import BUILDER, CACHED, CONTROL, FIRST, FLOOR, OPTIMUM, TORCH, WAYS, Job, Way
from benchmarks.llama_model import LlamaShape, write_llama
from benchmarks.process import Measured, measure, one_after_the_other, peak_of_all
from loracle.files import Checkpoint

SHAPE = LlamaShape(16, 2, 4, 2, 24, 300)
MB = 10**6


def _process(*lines: str) -> Measured:
    return measure([sys.executable, "-S", "-c", "\n".join(lines)])


def test_a_process_tells_what_it_and_its_children_read_wrote_and_held(tmp_path: Path) -> None:
    path = tmp_path / "data"
    child = f"open({str(path)!r}, 'rb', 0).read()"
    idle = _process("import subprocess, sys")
    busy = _process(
        "import subprocess, sys",
        f"open({str(path)!r}, 'wb', 0).write(bytearray({5 * MB}))",
        f"held = b'x' * {200 * MB}",
        f"subprocess.run([sys.executable, '-S', '-c', {child!r}], check=True)",
    )
    assert idle.written_bytes is not None
    assert idle.read_bytes is not None
    assert busy.written_bytes is not None
    assert busy.read_bytes is not None
    assert 5 * MB <= busy.written_bytes - idle.written_bytes < 6 * MB
    assert 5 * MB <= busy.read_bytes - idle.read_bytes < 7 * MB
    assert 200 * MB < busy.peak_bytes < idle.peak_bytes + 210 * MB
    assert 0 < idle.seconds < busy.seconds


def test_the_peak_of_all_counts_what_a_process_starts() -> None:
    hold = "import time; held = b'1' * 120_000_000; time.sleep(0.6)"
    alone = peak_of_all([sys.executable, "-c", hold], every=0.01)
    start = f"import subprocess, sys; {hold.split('; ')[1]}; subprocess.run([sys.executable, '-c', {hold!r}])"
    both = peak_of_all([sys.executable, "-c", start], every=0.01)
    assert 120 * MB < alone < 180 * MB
    assert alone + 110 * MB < both < 330 * MB
    with pytest.raises(SystemExit, match="exit code 3"):
        peak_of_all([sys.executable, "-c", "raise SystemExit(3)"])


def test_a_failure_shows_the_last_lines() -> None:
    with pytest.raises(SystemExit, match=r"(?s)^exit code 3: .*\nand why$"):
        _process("import sys", "print('and why', file=sys.stderr)", "sys.exit(3)")


def test_commands_in_turn_add_up_but_for_their_peaks() -> None:
    first, second = Measured(1.0, 20, 3, 4, 5), Measured(2.0, 10, 30, 40, None)
    assert one_after_the_other([first, second]) == Measured(3.0, 20, 33, 44, None)


def test_the_floor_reads_the_shards_and_writes_as_much_as_it_is_told(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("a", "b"):
        (base / f"{name}.safetensors").write_bytes(bytes(9 * MB))
    way = Job(base, base, tmp_path, "fp32", Path()).floor(20 * MB)
    idle, done = _process("import os, sys"), way.run()
    assert [(path.name, path.stat().st_size) for path in way.out.iterdir()] == [("floor", 20 * MB)]
    assert idle.read_bytes is not None
    assert done.read_bytes is not None
    assert 18 * MB <= done.read_bytes - idle.read_bytes < 19 * MB
    assert done.written_bytes == 20 * MB


def test_a_written_llama_is_what_transformers_expects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_model, "SHARD_BYTES", 8_000)
    monkeypatch.setattr(llama_model, "_BLOCK", 1000)
    folder = write_llama(tmp_path / "one", SHAPE, "bfloat16")
    with Checkpoint(folder) as checkpoint:
        assert 1 < len(checkpoint.shards) < 6
        expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
        assert {name: checkpoint.shape(name) for name in checkpoint.names} == {
            name: tuple(tensor.shape) for name, tensor in expected.items()
        }
        head = checkpoint.tensor("lm_head.weight").astype(np.float64)
        norm = checkpoint.tensor("model.norm.weight").astype(np.float64)
    # 4800 draws: six standard errors of their spread.
    assert abs(head.std() - 0.02) < 6 * 0.02 / (2 * head.size) ** 0.5
    assert np.array_equal(norm, np.ones(16))
    assert AutoTokenizer.from_pretrained(folder).encode("ab") == [64, 65]
    again = write_llama(tmp_path / "two", SHAPE, "bfloat16")
    other = write_llama(tmp_path / "three", SHAPE, "bfloat16", seed=1)
    for shard in folder.glob("*.safetensors"):
        assert shard.read_bytes() == (again / shard.name).read_bytes()
        assert shard.read_bytes() != (other / shard.name).read_bytes()


@pytest.mark.parametrize(("name", "parameters"), [(MIDDLE, 1_100_048_384), (LARGE, 6_738_415_616)])
def test_the_shapes_are_those_of_the_models_they_stand_for(name: str, parameters: int) -> None:
    shape = MODELS[name].shape
    assert shape is not None
    assert sum(int(np.prod(size)) for _, size in shape.tensors()) == parameters


def test_every_way_begins_without_what_it_made_before(tmp_path: Path) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    script = f"import os; os.mkdir({str(out)!r}); os.mkdir(os.environ['CACHE'])"
    way = Way("some", out, [[sys.executable, "-S", "-c", script]], [cache], {"CACHE": str(cache)})
    for _ in range(2):
        way.run()
        assert out.is_dir()
        assert cache.is_dir()
    way.clear()
    assert not out.exists()
    assert not cache.exists()


def test_only_the_first_export_begins_without_a_graph(tmp_path: Path) -> None:
    job = Job(tmp_path / "base", tmp_path / "adapter", tmp_path, "fp16", Path("python"))
    ways = {name: job.way(name) for name in WAYS}
    caches = {name: way.environment.get("LORACLE_CACHE") for name, way in ways.items()}
    assert caches[CACHED] == caches[CONTROL] == str(tmp_path / "cache")
    assert caches[FIRST] in map(str, ways[FIRST].leftovers)
    assert not ways[CACHED].leftovers
    assert {name: len(way.commands) for name, way in ways.items()} == {
        CACHED: 1,
        CONTROL: 1,
        FIRST: 1,
        BUILDER: 2,
        TORCH: 1,
        OPTIMUM: 2,
    }
    assert ways[OPTIMUM].commands[0][0] == "python"
    for name in (BUILDER, TORCH, OPTIMUM):
        assert ways[name].commands[0][-1] == "float16"


class _Job(Job):
    """Ways that write a file and note that they ran."""

    ran: list[str]

    def way(self, name: str) -> Way:
        return _Way(name, self.work / name, [])

    def floor(self, nbytes: int) -> Way:
        assert nbytes == len(CACHED)
        return _Way(FLOOR, self.work / FLOOR, [])


class _Way(Way):
    def run(self) -> Measured:
        _Job.ran.append(self.name)
        self.out.mkdir()
        (self.out / "data").write_text(self.name)
        return Measured(float(len(_Job.ran)), 1)


def test_the_ways_run_in_turn_and_backwards_in_every_second_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[str] = []

    def last_logits(folder: Path, base: Path) -> np.ndarray:
        judged.append(folder.name)
        return np.array([0.0, 1.0 + len(judged)])

    monkeypatch.setattr(export, "last_logits", last_logits)
    _Job.ran = []
    (tmp_path / "cache").mkdir()
    job = _Job(tmp_path, tmp_path, tmp_path, "fp32", Path())
    runs, errors = export.measure(job, (CACHED, BUILDER), 2, None)
    assert _Job.ran == [CACHED, FLOOR, CACHED, BUILDER, BUILDER, CACHED, FLOOR]
    assert [run.seconds for run in runs[BUILDER]] == [4.0, 5.0]
    assert judged == [CACHED, BUILDER]
    assert errors == {CACHED: 0.0, BUILDER: 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    judged.clear()
    _, errors = export.measure(job, (CACHED, FIRST), 1, None)
    assert errors == {}
    assert judged == []


def test_a_graph_that_was_traced_again_is_no_cached_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Way) -> Measured:
        (tmp_path / "cache" / f"graph {len(_Job.ran)}").touch()
        return plain(self)

    _Job.ran = []
    (tmp_path / "cache").mkdir()
    plain = _Way.run
    monkeypatch.setattr(_Way, "run", run)
    job = _Job(tmp_path, tmp_path, tmp_path, "fp32", Path())
    with pytest.raises(
        SystemExit, match=r"^loracle, graph cached: its graph was made anew during the rounds"
    ):
        export.measure(job, (CACHED,), 1, None)


def test_another_model_is_refused() -> None:
    logits = np.array([0.0, 2.0, 1.0])
    assert Judge(logits, 0.5).error("way", logits + 0.5) == 0.5
    with pytest.raises(
        SystemExit, match=r"^way: its logits are off by 0\.6, rounding explains 0\.5: nothing"
    ):
        Judge(logits, 0.5).error("way", logits + 0.6)
    with pytest.raises(SystemExit, match="off by nan"):
        Judge(logits, 0.5).error("way", logits * np.nan)
    assert Judge(logits, None).error("way", logits + 3) == 3.0
    with pytest.raises(SystemExit, match=r"^way: its most likely token is another: nothing to compare$"):
        Judge(logits, None).error("way", logits[::-1] + np.array([3.0, 0.0, 0.0]))


def _runs(seconds: Sequence[float], peak: int) -> list[Measured]:
    return [Measured(own, peak, 10, 20, 30) for own in seconds]


def test_the_rows_and_the_aims() -> None:
    runs = {
        FLOOR: _runs((1.0, 2.0, 1.0), 1),
        CACHED: _runs((3.0, 4.0, 1.0), 300 * MB),
        FIRST: _runs((9.0, 12.0, 20.0), 800 * MB),
        BUILDER: _runs((10.0, 10.0, 10.0), 900 * MB),
    }
    rows = rows_of(SMOL, runs, {CACHED: 0.5}, 2.0)
    assert [row["way"] for row in rows] == [FLOOR, CACHED, FIRST, BUILDER]
    _, cached, first, builder = rows
    assert (cached["seconds"], cached["over_builder"], cached["over_floor"]) == (3.0, 0.3, 2.0)
    assert cached["over_builder_interval"] == (0.1, 0.4, 0.75)
    assert (cached["peak_bytes"], cached["written_bytes"]) == (300 * MB, 20)
    assert (cached["largest_logit_error"], first["largest_logit_error"]) == (0.5, None)
    assert builder["over_builder"] is None
    assert {(check["way"], check["check"]): check["holds"] for check in checks(rows)} == {
        (CACHED, "time, over the builder's way"): True,
        (CACHED, "peak GB"): True,
        (FIRST, "time, over the builder's way"): False,
        (FIRST, "peak GB"): False,
    }


@pytest.mark.parametrize(
    ("model", "seconds", "peak", "expected"),
    [
        (MIDDLE, 9.0, 900, {"seconds": True, "peak GB": True}),
        (MIDDLE, 11.0, 1100, {"seconds": False, "peak GB": False}),
        (LARGE, 19.0, 1900, {"time, over the disk floor": True, "peak GB": True}),
        (LARGE, 21.0, 2100, {"time, over the disk floor": False, "peak GB": False}),
    ],
)
def test_the_aims_of_the_larger_models(
    model: str, seconds: float, peak: int, expected: dict[str, bool]
) -> None:
    runs = {FLOOR: _runs((10.0,), 1), CACHED: _runs((seconds,), peak * MB)}
    assert {check["check"]: check["holds"] for check in checks(rows_of(model, runs, {}, None))} == expected


def test_the_large_model_is_loracles_alone_unless_more_is_asked_for() -> None:
    assert export.ways_of(MODELS[LARGE], None) == (CACHED, CONTROL, FIRST)
    assert export.ways_of(MODELS[SMOL], None) == WAYS
    assert export.ways_of(MODELS[LARGE], [BUILDER, CACHED]) == (CACHED, BUILDER)


@pytest.mark.slow
def test_the_result_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tolerances: list[float | None] = []
    plain = export_parity.Judge.error

    def spy(self: Judge, name: str, logits: Any) -> float:
        tolerances.append(self.tolerance)
        return plain(self, name, logits)

    monkeypatch.setattr(export_parity.Judge, "error", spy)
    out = tmp_path / "new" / "export.json"
    export.main(["--quick", "--ways", CACHED, CONTROL, "--scratch", str(tmp_path), "--out", str(out)])
    result = json.loads(out.read_text())
    assert [row["way"] for row in result["rows"]] == [FLOOR, CACHED, CONTROL]
    _, cached, control = result["rows"]
    assert tolerances == [cached["logit_tolerance"]] * 2
    assert 0 < cached["largest_logit_error"] <= cached["logit_tolerance"]
    assert cached["largest_logit_error"] == control["largest_logit_error"]
    assert cached["over_builder"] is None
    assert cached["over_floor"] > 1
    assert cached["runs"][0]["seconds"] == cached["seconds"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert "…" not in capsys.readouterr().out
