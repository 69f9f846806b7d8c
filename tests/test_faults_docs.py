"""docs/faults.md names tests that are there, in every clause, and every writer."""

from __future__ import annotations

import re

import pytest
from citations import TESTS, cited, clauses_of, defined_in
from faults.readers import SUFFIXES
from faults.writers import WRITERS

PAGE = (TESTS.parent / "docs" / "faults.md").read_text("utf-8")
CLAUSES = clauses_of("faults.md")


@pytest.mark.parametrize("clause", CLAUSES)
def test_every_clause_names_tests_that_are_there(clause: str) -> None:
    citations = cited(CLAUSES[clause])
    assert citations
    for module, test in citations:
        assert test in defined_in(module), f"{module} has no {test}"


def test_the_clauses_are_numbered() -> None:
    assert [int(clause.partition(".")[0]) for clause in CLAUSES] == list(range(1, len(CLAUSES) + 1))
    assert len(CLAUSES) >= 8


def test_every_writer_is_in_the_table() -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", PAGE.partition("## The writers")[2], re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([^`]*)`", row)]
    written = [
        name.replace("FORM", form) for name in named for form in (SUFFIXES if "FORM" in name else ("",))
    ]
    assert sorted(written) == sorted(WRITERS)
