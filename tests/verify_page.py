"""The tables of docs/verify.md: written from what `verify` says of candidates, and read again by the tests.

python tests/verify_page.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from candidates.runs import SECTIONS, Run, Workshop, said, untold

from loracle.demo.smollm2 import model_folder
from loracle.files import cache_folder

PAGE = Path(__file__).parent.parent / "docs" / "verify.md"
SEPARATOR = "; "
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

HEAD = """Written by `make verify-table` from what `verify` says, and held to it by the tests: every weight of
every candidate has the verdict that it should have, and no other. The models are small Llama models with
random weights, named by the dtype of their base (query and value adapted, embeddings tied, unless another is
said), a GPT-2, a BERT classifier, and SmolLM2-135M-Instruct.
"""
COLUMNS = ("candidate", "made with", "base", "what verify says of its weights", "passes", "what to do")


def line(row: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(row)} |\n"


def rows(page: Path = PAGE) -> dict[tuple[str, ...], tuple[str, ...]]:
    """(section, candidate, tool, base) -> the other cells, of the tables on the page."""
    text = page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    found = {}
    section = ""
    for read in text.splitlines():
        if read.startswith("### "):
            section = read.removeprefix("### ")
        elif read.startswith("| ") and not read.startswith(("| --- ", f"| {COLUMNS[0]} ")):
            name, tool, bases, *others = (cell.strip() for cell in read.strip("|").split(" | "))
            found.update({(section, name, tool, base): tuple(others) for base in bases.split(SEPARATOR)})
    return found


def tables(workshop: Workshop) -> str:
    """What stands between the markers. Bases of which the same is said share a line."""
    text = HEAD
    for section, cases in SECTIONS.items():
        text += f"\n### {section}\n\n{line(COLUMNS)}{line(('---',) * len(COLUMNS))}"
        for case in cases:
            lines: dict[str, list[str]] = {}
            for subject in case.subjects:
                print(section, case.name, case.tool, subject, sep=", ", flush=True)
                cell = said(workshop.report(Run(section, case, subject))[0])
                alike = next((first for first in lines if untold(first) == untold(cell)), cell)
                lines.setdefault(alike, []).append(subject)
            for cell, bases in lines.items():
                passes = "yes" if case.passes else "no"
                text += line((case.name, case.tool, SEPARATOR.join(bases), cell, passes, case.advice))
    return text


def main() -> None:
    """Make and verify all candidates, and write the page."""
    with tempfile.TemporaryDirectory() as work:
        table = tables(Workshop(Path(work), model_folder(cache_folder())))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
