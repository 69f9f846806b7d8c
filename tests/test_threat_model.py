"""docs/threat-model.md names tests that are there, in every clause, and every reader."""

import re
from pathlib import Path

from citations import TESTS, cited, clauses_of, defined_in
from fuzz.targets import TARGETS

PAGE = (TESTS.parent / "docs" / "threat-model.md").read_text("utf-8")
CLAUSES = clauses_of("threat-model.md")


def test_every_hostile_test_is_cited_by_a_clause() -> None:
    named = {citation for clause in CLAUSES.values() for citation in cited(clause)}
    for path in sorted(TESTS.glob("test_hostile_*.py")):
        for test in defined_in(path.name):
            uncited = test.startswith("test_") and (path.name, test) not in named
            assert not uncited or path.name == "test_hostile_fuzz.py" or _plain(test), f"{path.name}::{test}"


def _plain(test: str) -> bool:
    """Whether a test is of what is right, or of what other clauses have cited by another test."""
    return "_is_read" in test or "_are_read" in test or "is_mapped" in test or "_and_right_" in test


def test_the_readers_of_the_table_are_there_and_the_fuzzed_ones_are_all() -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", PAGE.partition("| reader |")[2], re.MULTILINE)
    readers = [name for row in rows for name in re.findall(r"`([^`]*)`", row)]
    assert len(readers) >= 13
    for reader in readers:
        assert (TESTS.parent / reader).is_file(), reader
    fuzzed = Path(TESTS, "fuzz", "targets.py").read_text("utf-8")
    for reader in readers:
        module = reader.removesuffix(".py").replace("/", ".")
        name = module.rpartition(".")[2]
        assert name in fuzzed or name in ("checkpoint", "adapter", "config", "tokenizer_file"), reader
    assert len(TARGETS) >= 14
