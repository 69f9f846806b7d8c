"""The clauses of a page in docs/, and the tests that they name."""

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent


def clauses_of(page: str) -> dict[str, str]:
    """Return the text of each numbered section of a page in docs/, by its heading."""
    text = (TESTS.parent / "docs" / page).read_text("utf-8")
    return dict(re.findall(r"^## (\d+\. [^\n]*)\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL))


def cited(clause: str) -> list[tuple[str, str]]:
    """Return module and test of each citation; `::test` alone is of the module before."""
    module, found = "", []
    for name, test in re.findall(r"`(test_\w+\.py)?::(test_\w+)`", clause.partition("*Tests:*")[2]):
        module = name or module
        found.append((module, test))
    return found


@cache
def defined_in(module: str) -> frozenset[str]:
    """Return the names of a test module's functions."""
    parsed = ast.parse((TESTS / module).read_text("utf-8"))
    return frozenset(node.name for node in parsed.body if isinstance(node, ast.FunctionDef))
