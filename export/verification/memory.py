"""How much memory a process may still take, as far as the system says."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def available_memory(meminfo: Path = _MEMINFO, control_group: Path = _CONTROL_GROUP) -> int | None:
    """Bytes that are free or can be freed, within the limit of the control group; None where nothing says.

    Args:
        meminfo: the kernel's account of the machine's memory.
        control_group: the folder of the process's control group, of version 2.
    """
    found = [size for size in (_of_machine(meminfo), _of_group(control_group)) if size is not None]
    return min(found, default=None)


def _of_machine(meminfo: Path) -> int | None:
    for line in _lines(meminfo):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _of_group(folder: Path) -> int | None:
    limit, used = (_lines(folder / name) for name in ("memory.max", "memory.current"))
    if not limit or not used or not limit[0].isdigit():
        return None
    # Pages of files count as used, and can be dropped.
    cached = sum(
        int(value)
        for name, _, value in (line.partition(" ") for line in _lines(folder / "memory.stat"))
        if name in ("inactive_file", "active_file")
    )
    return max(0, int(limit[0]) - int(used[0]) + cached)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
