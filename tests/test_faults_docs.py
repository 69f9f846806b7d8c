"""docs/faults.md names tests that are there, in every clause, and every writer."""

from __future__ import annotations

import re

from citations import TESTS, clauses_of
from faults.readers import SUFFIXES
from faults.writers import WRITERS

PAGE = (TESTS.parent / "docs" / "faults.md").read_text("utf-8")
CLAUSES = clauses_of("faults.md")


def test_every_writer_is_in_the_table() -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", PAGE.partition("## The writers")[2], re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([^`]*)`", row)]
    written = [
        name.replace("FORM", form) for name in named for form in (SUFFIXES if "FORM" in name else ("",))
    ]
    assert sorted(written) == sorted(WRITERS)
