"""Every writer, killed, interrupted and refused at its every call, and without power: the old or the new.

`make test` takes some calls of each writer, and all that a disk may hold after an outage; the rest is slow.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.inputs import inputs_of_session
from faults.remote import call, skip_unless_held
from faults.supervised import FAULTS
from faults.sweeps import long_sweep, needless_flushes, outages, short_sweep
from faults.writers import WRITERS

TRAINING = "fine-tuning"
"""A second for each run: its files are those of `adapter` and of the checkpoints."""
NEEDLESS = {
    # files are renamed out of the folder under way, whose own names nobody needs then
    **dict.fromkeys(("new task, linked", "exchanged task, linked"), 1),
    # the same, for the base and for the task; and the base's last names are flushed with the task's first
    "in place, linked": 3,
    "in place, swappable": 1,
    # the graph that follows is flushed in the same folder
    "removed task, swappable": 1,
    # what is lost is made again
    "cache": 1,
    # the folder was there before
    "later checkpoints": 1,
}
"""Flushes that a writer could do without."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_unless_held()
    return inputs_of_session(tmp_path_factory)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != TRAINING])
def test_after_a_fault_there_is_the_old_or_the_new(inputs: Path, tmp_path: Path, name: str) -> None:
    found = call(short_sweep, name, inputs, tmp_path)
    assert not found.wrong
    assert found.counts["outages: old"]
    assert found.counts["outages: new"]


def test_without_power_a_run_leaves_no_adapter_or_a_whole_one(inputs: Path, tmp_path: Path) -> None:
    found = call(outages, TRAINING, inputs, tmp_path)
    assert not found.wrong
    assert found.counts["outages: old"]
    assert found.counts["outages: new"]


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_after_any_fault_at_any_call_there_is_the_old_or_the_new(
    inputs: Path, tmp_path: Path, name: str
) -> None:
    kinds = ("kill", "ENOSPC") if name == TRAINING else FAULTS
    found = call(long_sweep, name, inputs, tmp_path, kinds)
    print(f"{name}: {dict(found.counts)}")
    assert not found.wrong


@pytest.mark.parametrize("name", ["file", "adapter", "new task, swappable", "first checkpoint"])
def test_every_flush_is_needed(inputs: Path, tmp_path: Path, name: str) -> None:
    assert not call(needless_flushes, name, inputs, tmp_path).wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in WRITERS if name != TRAINING and not name.startswith("first task")]
)
def test_flushes_that_are_not_needed_are_known(inputs: Path, tmp_path: Path, name: str) -> None:
    """Left out are those that are repeated: a first task is written, with its flushes, into a folder that is
    flushed whole, and checkpoints are gone when training ends."""
    found = call(needless_flushes, name, inputs, tmp_path)
    assert len(found.wrong) == NEEDLESS.get(name, 0), found.wrong
