"""docs/architectures.md: written from what the architecture tests see, and read again by them.

python tests/architectures_page.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from architecture_runs import EXPORTED, Outcome, run

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"

HEAD = """# Architectures that can be exported

Each row is a small random model of the architecture with an adapter on all linear layers, merged and exported
to float32, and run by onnxruntime on the CPU: the largest difference of an output from that of the unmerged
model in float64, and the bound that it has to stay inside (docs/numerics.md, clause 7). A model with a cache
gets a batch with padding on the left, and on the right, and then a token at a time; one with an encoder
before its decoder gets sources with padding. `make architectures` writes the page anew; the tests check that
it is current.

| architecture | class | task | largest error | bound | onnxruntime's own operators |
| --- | --- | --- | --- | --- | --- |
"""


def row(outcome: Outcome) -> str:
    """A line of the table."""
    cells = (
        outcome.name,
        outcome.model,
        outcome.task,
        f"{outcome.error:.1e}",
        f"{outcome.tolerance:.1e}",
        ", ".join(outcome.fused),
    )
    return f"| {' | '.join(cells)} |\n"


def rows() -> dict[str, tuple[str, ...]]:
    """The cells of each row of the page after the first, which is the key."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]
    return {name: tuple(others) for name, *others in cells}


def main() -> None:
    """Run all cases and write the page."""
    with tempfile.TemporaryDirectory() as work:
        table = "".join(row(run(name, Path(work, name))) for name in EXPORTED)
    PAGE.write_text(HEAD + table, encoding="utf-8")


if __name__ == "__main__":
    main()
