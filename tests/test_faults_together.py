"""Two writers at once, and a writer beside a reader, in every order that their system calls can take.

Locks are flock's: on a file system that has none, two writers at once are not kept apart.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.inputs import inputs_of_session
from faults.readers import SUFFIXES
from faults.remote import call, skip_unless_held
from faults.together import PAIRS, reader_and_writer, two_writers


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_unless_held()
    return inputs_of_session(tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_two_writers_end_as_if_one_came_after_the_other(inputs: Path, tmp_path: Path, name: str) -> None:
    found = call(two_writers, name, inputs, tmp_path, every=True)
    print(f"{name}: {dict(found.counts)}")
    assert not found.wrong


@pytest.mark.parametrize("name", ["file", "exchanged and exchanged, linked"])
def test_two_writers_stopped_at_changes_of_names(inputs: Path, tmp_path: Path, name: str) -> None:
    found = call(two_writers, name, inputs, tmp_path, every=False)
    assert not found.wrong


@pytest.mark.slow
@pytest.mark.parametrize("form", SUFFIXES)
def test_a_reader_has_the_old_task_or_the_new(inputs: Path, tmp_path: Path, form: str) -> None:
    found = call(reader_and_writer, form, inputs, tmp_path, every=True)
    print(f"{form}: {dict(found.counts)}")
    assert not found.wrong
