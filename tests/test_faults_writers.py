"""Every writer, killed, interrupted and refused at its every call, and without power: the old or the new.

`make test` takes some calls of each writer, and all that a disk may hold after an outage; the rest is slow.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.inputs import make_inputs
from faults.remote import call, skip_unless_held
from faults.sweeps import needless_flushes, outages, sweep
from faults.writers import WRITERS


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_unless_held()
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("name", WRITERS)
def test_without_power_the_disk_has_the_old_or_the_new(inputs: Path, tmp_path: Path, name: str) -> None:
    found = call(outages, name, inputs, tmp_path)
    assert not found.wrong
    assert found.counts["outages: old"]
    assert found.counts["outages: new"]


@pytest.mark.parametrize("name", WRITERS)
def test_after_a_fault_there_is_the_old_or_the_new(inputs: Path, tmp_path: Path, name: str) -> None:
    found = call(sweep, name, inputs, tmp_path, every=False)
    assert not found.wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_after_any_fault_at_any_call_there_is_the_old_or_the_new(
    inputs: Path, tmp_path: Path, name: str
) -> None:
    found = call(sweep, name, inputs, tmp_path, every=True)
    print(f"{name}: {dict(found.counts)}")
    assert not found.wrong


@pytest.mark.parametrize("name", WRITERS)
def test_every_flush_is_needed(inputs: Path, tmp_path: Path, name: str) -> None:
    found = call(needless_flushes, name, inputs, tmp_path)
    assert not found.wrong
