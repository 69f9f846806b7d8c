"""Every package of the rooms is installed, with the folder that it lies in."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]


def test_every_package_is_named_with_its_folder() -> None:
    rooms = [name.removeprefix("loracle.") for name in SETTINGS["importlinter"]["root_packages"]]
    assert len(rooms) == 7
    folders = {path.parent.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("__init__.py")}
    expected = {f"loracle.{'.'.join(folder.parts)}": folder.as_posix() for folder in folders}
    assert SETTINGS["setuptools"]["package-dir"] == expected
    assert sorted(SETTINGS["setuptools"]["packages"]) == sorted(expected)
