"""Memory that is there, in the words of the kernel's files."""

from pathlib import Path

import pytest

from loracle.export.verification.memory import available_memory

GIB = 2**30


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8388608 kB\n")
    return path


def group(folder: Path, limit: str, used: int, files: int = 0) -> Path:
    folder.mkdir()
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {files // 2}\nactive_file {files // 2}\n")
    return folder


def test_the_machines_memory_counts_where_the_group_has_no_limit(meminfo: Path, tmp_path: Path) -> None:
    assert available_memory(meminfo, tmp_path / "none") == 8 * GIB
    assert available_memory(meminfo, group(tmp_path / "group", "max", GIB)) == 8 * GIB


def test_a_groups_limit_counts_where_it_is_less(meminfo: Path, tmp_path: Path) -> None:
    assert available_memory(meminfo, group(tmp_path / "group", str(4 * GIB), 3 * GIB, 2 * GIB)) == 3 * GIB
    assert available_memory(meminfo, group(tmp_path / "full", str(GIB), 2 * GIB)) == 0


def test_where_nothing_says_nothing_is_known(tmp_path: Path) -> None:
    assert available_memory(tmp_path / "meminfo", tmp_path / "group") is None


def test_this_machine_says_something() -> None:
    found = available_memory()
    assert found is None or found > 2**20
