"""Pages of promises name, in every clause, tests that are there."""

from __future__ import annotations

import pytest
from citations import cited, clauses_of, defined_in

LEAST = {"faults.md": 8, "threat-model.md": 14}
"""The pages, and how many clauses each has at least."""

CLAUSES = {page: clauses_of(page) for page in LEAST}


@pytest.mark.parametrize(("page", "clause"), [(page, clause) for page in LEAST for clause in CLAUSES[page]])
def test_every_clause_names_tests_that_are_there(page: str, clause: str) -> None:
    citations = cited(CLAUSES[page][clause])
    assert citations
    for module, test in citations:
        assert test in defined_in(module), f"{module} has no {test}"


@pytest.mark.parametrize("page", LEAST)
def test_the_clauses_are_numbered(page: str) -> None:
    clauses = CLAUSES[page]
    assert [int(clause.partition(".")[0]) for clause in clauses] == list(range(1, len(clauses) + 1))
    assert len(clauses) >= LEAST[page]
