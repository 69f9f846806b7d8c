"""Changed files of every kind that is read, a few hundred of each; `make fuzz` reads a million."""

import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz import oracle, run
from fuzz.targets import TARGETS, seeds_of
from hypothesis import given, settings
from hypothesis import strategies as st

from loracle.reference import ConfigError

_EXAMPLES = {"graph": 60, "deployment": 30, "tokenizer": 80, "state": 60}


@pytest.mark.parametrize("target", TARGETS)
def test_changed_files_are_read_or_refused_and_nothing_else(
    target: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp(target)

    @settings(max_examples=_EXAMPLES.get(target, 250))
    @given(number=st.integers(0, 2**32))
    def check(number: int) -> None:
        oracle.execute(target, oracle.inputs_of(target, 1, number), folder)

    check()


@pytest.mark.parametrize("target", TARGETS)
def test_the_files_that_are_changed_are_valid(target: str, tmp_path: Path) -> None:
    """Else changes of them would never come deep. A base has no biases, and a long path is refused."""
    outcomes = [oracle.execute(target, files, tmp_path) for files in seeds_of(target)]
    assert outcomes.count("read") > len(outcomes) / 3
    assert all("read" in own or "may take for ever" in own or "no such tensor" in own for own in outcomes)


def test_an_execution_is_a_function_of_seed_target_and_number() -> None:
    for target in TARGETS:
        first = [oracle.inputs_of(target, 3, number) for number in range(8)]
        random.seed(number := 5)
        assert [oracle.inputs_of(target, 3, number) for number in range(8)] == first
        assert [oracle.inputs_of(target, 4, number) for number in range(8)] != first
        assert number == 5


def _write(folder: Path) -> None:
    (folder / "new").touch()


def _change(folder: Path) -> None:
    (folder / "x.json").write_bytes(b"{}")


def _remove(folder: Path) -> None:
    (folder / "x.json").unlink()


def _warn(folder: Path) -> None:
    warnings.warn("odd", UserWarning, stacklevel=1)


def _several_lines(folder: Path) -> None:
    error = ConfigError("x")
    error.args = ("a\nb",)
    raise error


def _take(seconds: float) -> Callable[[Path], None]:
    def take(folder: Path) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return take


def _raise(error: BaseException) -> Callable[[Path], None]:
    def raises(folder: Path) -> None:
        raise error

    return raises


def _sleep(folder: Path) -> None:
    try:
        time.sleep(60)
    except Exception:  # noqa: BLE001  a reader that would hide that it was stuck
        return


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (_write, "the folder has changed"),
        (_change, "the folder has changed"),
        (_remove, "the folder has changed"),
        (_warn, "UserWarning: odd"),
        (_several_lines, "several lines"),
        (_take(0.3), "0.3 seconds"),
        (_sleep, "no end after"),
        *(
            (_raise(kind("x")), kind.__name__)
            for kind in (MemoryError, RecursionError, KeyError, OverflowError, SystemExit)
        ),
        (_raise(AssertionError("x")), "AssertionError"),
    ],
)
def test_what_must_not_happen_is_seen(
    read: Callable[[Path], None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "read", lambda target, folder: read(folder))
    monkeypatch.setattr(oracle, "MOST_SECONDS", 0.2)
    monkeypatch.setattr(oracle, "_STUCK_SECONDS", 1 if read is _sleep else 60)
    with pytest.raises(oracle.Failure, match=said):
        oracle.execute("json", {"x.json": b"[]"}, tmp_path)


def test_outcomes_are_counted_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(target: str, folder: Path) -> None:
        content = (folder / "x.json").read_bytes()
        if content == b"1":
            raise ConfigError(f"{folder}/x.json: key 'a': got 17")
        if content == b"2":
            raise KeyError("a")

    given: list[bytes] = [b"0", b"1", b"1", b"2"]
    monkeypatch.setattr(oracle, "read", read)
    monkeypatch.setattr(run, "inputs_of", lambda target, seed, number: {"x.json": given[number]})
    tally = run.run_batch("json", 0, range(4), tmp_path)
    assert tally.outcomes == {"read": 1, "ConfigError: * key *: got *": 2}
    assert [number for number, _ in tally.failures] == [3]
    assert tally.executions == 4


def test_shares_are_of_all_executions() -> None:
    shares = run.shares(1_100_000, list(TARGETS))
    assert sum(shares.values()) >= 1_100_000
    assert set(shares) == set(TARGETS)
    assert run.shares(10, ["json"]) == {"json": 10}


def test_a_failure_can_be_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(run, "KEPT", tmp_path)
    run._keep("json", 0, 3)
    (kept,) = tmp_path.iterdir()
    assert kept.name == "json-0-3"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == oracle.inputs_of("json", 0, 3)
    assert run.main(["--replay", str(kept), "--target", "json"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_a_process_that_dies_is_told_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Workers are processes: what dies in one is a failure of one number, and the run goes on."""
    monkeypatch.setattr(run, "KEPT", tmp_path)
    monkeypatch.setenv("LORACLE_FUZZ_DIES", "json 7")
    assert run.main(["--executions", "20", "--target", "json", "--workers", "2"]) == 1
    said = capsys.readouterr().out
    assert "number 7: the process died: -9" in said
    assert "20 executions" in said
    assert "1 failures" in said
    assert [path.name for path in tmp_path.iterdir()] == ["json-0-7"]
