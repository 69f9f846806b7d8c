"""Which modules are mutated, under which names they are imported, and which tests have to notice.

All modules of `reference/` are, each tested by the tests that have its name in theirs. In the other rooms
those are that read what others wrote and that judge it, each with the tests that are named here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

# Counts the examples in docstrings, of which mutmut makes a copy for each mutant.
_NOT_RUN = {"test_reference_doctests"}


@dataclass(frozen=True)
class Room:
    """A folder of modules that are mutated.

    Attributes:
        name: that names it on the command line and in docs/mutants.md.
        folder: of its modules, in the repository and below ``loracle``, with slashes.
        prefix: of its test modules' names.
        required: the share of its mutants that has to be killed.
        tests: module to its test modules, without the prefix; empty where names say it, for all modules.
    """

    name: str
    folder: str
    prefix: str
    required: float
    tests: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def package(self) -> str:
        return f"loracle.{self.folder.replace('/', '.')}"

    @property
    def staged(self) -> str:
        """The folder that is staged whole: an installed one would be a package of its own."""
        return self.folder.partition("/")[0]

    @property
    def modules(self) -> list[str]:
        """The names of the modules that are mutated."""
        if self.tests:
            return sorted(self.tests)
        return sorted(p.stem for p in (REPOSITORY / self.folder).glob("*.py") if p.stem != "__init__")

    def all_tests(self) -> list[str]:
        """Return the names NAME of all tests/test_ROOM_NAME.py that are run."""
        if self.tests:
            return sorted({test for tests in self.tests.values() for test in tests})
        paths = sorted((REPOSITORY / "tests").glob(f"{self.prefix}*.py"))
        return [path.stem.removeprefix(self.prefix) for path in paths if path.stem not in _NOT_RUN]

    def own_tests(self, module: str, tests: Sequence[str]) -> list[str]:
        """Return those of the tests that are the module's.

        Where names say it, those that have the module's name in theirs; where none has `linear_shapes`,
        `linear`'s; all if none has.
        """
        if self.tests:
            return [test for test in self.tests[module] if test in tests]
        words = module.split("_")
        names = ["_".join(words[:count]) for count in range(len(words), 0, -1)]
        return next(filter(None, ([test for test in tests if name in test] for name in names)), list(tests))


REFERENCE = Room("reference", "reference", "test_reference_", 0.95)

FILES = Room(
    "files",
    "files",
    "test_files_",
    0.9,
    {
        "adapter": ["adapter_folder"],
        "adapter_checks": ["adapter_checks"],
        "adapter_tensors": ["adapter_tensors"],
        "config": ["config", "config_messages"],
        "config_checks": ["config", "config_messages"],
        "config_keys": ["config", "config_messages"],
        "json_file": ["json_file"],
        "lora_pair": ["lora_pair"],
        "loralib": ["loralib"],
        "peft_keys": ["peft_keys"],
        "safetensors_file": ["safetensors"],
        "updates": ["updates", "weights"],
    },
)

VERIFICATION = Room(
    "verification",
    "export/verification",
    "test_export_",
    0.9,
    {
        "alternatives": ["alternatives"],
        "beside_products": ["matching_parts", "weight_matching"],
        "certificate": ["certificate"],
        "certificate_charts": ["certificate_charts"],
        "certificate_page": ["certificate_page"],
        "checkpoint_candidate": ["checkpoint_candidate"],
        "clauses": ["clauses"],
        "comparison": ["comparison"],
        "comparisons": ["comparisons"],
        "content_search": ["matching_parts", "weight_matching"],
        "content_signature": ["content_signature", "matching_parts", "weight_matching"],
        "digests": ["digests"],
        "exported_candidate": ["exported_candidate", "exported_weights"],
        "foreign_candidate": ["foreign_candidate"],
        "input_files": ["digests"],
        "judge": ["judge", "judge_ahead", "judge_words"],
        "matching_steps": ["matching_parts", "weight_matching"],
        "memory": ["memory"],
        "one_weight": ["one_weight"],
        "printable": ["printable"],
        "quantized_tensors": ["matching_parts", "weight_matching"],
        "residue": ["residue"],
        "roundings": ["roundings"],
        "statement": ["statement"],
        "trained": ["trained"],
        "ulps": ["ulps"],
        "verdict": ["verdict"],
        "weight_matching": ["matching_parts", "weight_matching"],
        "weight_signatures": ["content_signature", "matching_parts", "weight_matching"],
        "weights_check": ["weights_check"],
    },
)

ROOMS = {room.name: room for room in (REFERENCE, FILES, VERIFICATION)}


def room_and_module(name: str) -> tuple[Room, str]:
    """Return the room and the module of a name: ``files.adapter``; ``linear`` is in `reference/`.

    Raises:
        ValueError: no module that is mutated has this name.
    """
    first, dot, rest = name.partition(".")
    room, module = (ROOMS.get(first), rest) if dot else (REFERENCE, first)
    if room is None or module not in room.modules:
        raise ValueError(f"expected a module of reference/, or a module of {', '.join(ROOMS)}, got {name}")
    return room, module
