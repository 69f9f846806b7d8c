"""What became of the mutants: counts, survivors, and the page docs/mutants.md that lists the survivors."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .rooms import REFERENCE, REPOSITORY, ROOMS

PAGE = REPOSITORY / "docs" / "mutants.md"
COLUMNS = ("killed", "survived", "timeout", "no tests", "other")


@dataclass(frozen=True)
class Mutant:
    """A changed function; ``change`` is what `change_of` makes of the diff.

    ``module`` is a name of `room_and_module`; ``function`` is a function's name, or ``Class.method``.
    """

    module: str
    function: str
    change: str

    @property
    def room(self) -> str:
        return _in_parts(self.module)[0]


@dataclass(frozen=True)
class Result:
    """What became of one mutant; name and status as mutmut gives them."""

    name: str
    status: str

    @property
    def module(self) -> str:
        return split_name(self.name)[0]

    @property
    def killed(self) -> bool:
        """Whether a test failed; a timeout, or a mutant that no test runs, is no kill."""
        return self.status == "killed"


def split_name(name: str) -> tuple[str, str]:
    """Return module and function of mutmut's name for a mutant.

    ``loracle.reference.tiles.x_tiles__mutmut_3`` is in ("tiles", "tiles"),
    ``loracle.reference.precision.xǁPrecisionǁgrowth__mutmut_1`` in ("precision", "Precision.growth"),
    ``loracle.files.adapter.x_read_adapter__mutmut_2`` in ("files.adapter", "read_adapter").
    """
    qualified = name.partition("__mutmut_")[0]
    room = next(room for room in ROOMS.values() if qualified.startswith(f"{room.package}."))
    module, _, mangled = qualified.removeprefix(f"{room.package}.").partition(".")
    module = module if room is REFERENCE else f"{room.name}.{module}"
    function = mangled.removeprefix("xǁ").replace("ǁ", ".") if "ǁ" in mangled else mangled.removeprefix("x_")
    return module, function


def change_of(diff: str) -> str:
    """Return in one line the lines that a unified diff takes out and those that it puts in.

    Every run of white space is one space, so that a mutant is recognised after its code has been moved or
    indented otherwise.
    """
    body = [line for line in diff.splitlines() if not line.startswith(("---", "+++", "@@", "#"))]
    old, new = (" ".join(" ".join(x[1:] for x in body if x[:1] == sign).split()) for sign in "-+")
    return f"`{old}` -> `{new}`"


def listed_mutants(page: str) -> set[Mutant]:
    """Return the mutants in the table of docs/mutants.md: rows of module.function, change and reason.

    Raises:
        ValueError: a row gives no reason.
    """
    found = set()
    for line in page.splitlines():
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) != 3 or not cells[1].startswith("`"):
            continue
        if not cells[2]:
            raise ValueError(f"{PAGE.name}: expected a reason why {cells[0]} {cells[1]} survives; write one")
        room, module, function = _in_parts(cells[0].strip("`"))
        found.add(Mutant(module if room == REFERENCE.name else f"{room}.{module}", function, cells[1]))
    return found


def _in_parts(where: str) -> tuple[str, str, str]:
    """Room, module and function of ``module.function``, in `reference/`, or ``room.module.function``."""
    first, _, rest = where.partition(".")
    room, rest = (first, rest) if first in ROOMS and first != REFERENCE.name else (REFERENCE.name, where)
    module, _, function = rest.partition(".")
    return room, module, function


def as_row(mutant: Mutant) -> str:
    """Return the row that lists a mutant, its reason left open."""
    return f"| `{mutant.module}.{mutant.function}` | {mutant.change.replace('|', chr(92) + '|')} | |"


def summary(results: Sequence[Result]) -> str:
    """Return a table of counts: a line for each module and one for all."""
    lines = [f"{'module':<36}{'all':>6}" + "".join(f"{name:>10}" for name in COLUMNS) + f"{'killed':>9}"]
    modules = sorted({result.module for result in results})
    for label, chosen in [*((m, [r for r in results if r.module == m]) for m in modules), ("all", results)]:
        count = Counter(r.status if r.status in COLUMNS else "other" for r in chosen)
        counts = "".join(f"{count[name]:>10}" for name in COLUMNS)
        lines.append(f"{label:<36}{len(chosen):>6}{counts}{100 * killed_share(chosen):>8.1f}%")
    return "\n".join(lines)


def killed_share(results: Sequence[Result]) -> float:
    """Return which part of all mutants was killed."""
    return sum(result.killed for result in results) / len(results)


def too_few(results: Sequence[Result], required: float) -> list[str]:
    """Return which modules have too small a share of their mutants killed."""
    modules = sorted({result.module for result in results})
    shares = {m: killed_share([r for r in results if r.module == m]) for m in modules}
    return [f"{m}: killed {own:.1%}, required {required:.0%}" for m, own in shares.items() if own < required]


def unlisted(survivors: Sequence[Mutant], listed: set[Mutant]) -> list[str]:
    """Return the rows of the survivors that the page does not list, after a line that says so."""
    rows = [as_row(mutant) for mutant in survivors if mutant not in listed]
    return [f"{len(rows)} survivors are not in docs/{PAGE.name}; kill or list them:", *rows] if rows else []


def complaints(
    results: Sequence[Result], survivors: Sequence[Mutant], listed: set[Mutant], required: float
) -> list[str]:
    """Return what fails the run of a whole room: too few kills in all, survivors that are not listed."""
    share = killed_share(results)
    found = [f"killed {share:.1%}, required {required:.0%}"] if share < required else []
    return found + unlisted(survivors, listed)
