"""Wheels come through pip, are checked, and are fetched once. Here pip's index is a folder."""

import zipfile
from pathlib import Path

import pytest

from loracle.demo import wheels
from loracle.reference import FileError


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that serves as pip's only index, with the wheel of ``tinydemo==1.0`` in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tinydemo-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tinydemo/__init__.py", "")
        archive.writestr(
            "tinydemo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinydemo\nVersion: 1.0\n"
        )
        archive.writestr(
            "tinydemo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinydemo-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def test_a_wheel_is_fetched_once(index: Path, tmp_path: Path) -> None:
    digest = wheels.sha256(index / "tinydemo-1.0-py3-none-any.whl")
    said: list[str] = []
    first = wheels.cached_wheel("tinydemo==1.0", digest, tmp_path / "cache", said.append)
    (index / "tinydemo-1.0-py3-none-any.whl").unlink()
    assert wheels.cached_wheel("tinydemo==1.0", digest, tmp_path / "cache", said.append) == first
    assert wheels.sha256(first) == digest
    assert said == ["downloading tinydemo==1.0"]
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_a_damaged_wheel_in_the_cache_is_fetched_again(index: Path, tmp_path: Path) -> None:
    digest = wheels.sha256(index / "tinydemo-1.0-py3-none-any.whl")
    kept = wheels.cached_wheel("tinydemo==1.0", digest, tmp_path)
    kept.write_bytes(b"half")
    assert wheels.sha256(wheels.cached_wheel("tinydemo==1.0", digest, tmp_path)) == digest


def test_another_wheel_is_refused_and_not_kept(index: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileError, match=r"tinydemo-1\.0-py3-none-any\.whl: expected SHA-256 0{64}, got [0-9a-f]{64}"
    ):
        wheels.cached_wheel("tinydemo==1.0", "0" * 64, tmp_path / "cache")
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


def test_a_missing_wheel_is_one_line_with_pips_own_words(index: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileError,
        match=r"^absent==9: pip download ended with code 1 \(ERROR: No matching distribution found",
    ) as caught:
        wheels.download_wheel("absent==9", tmp_path)
    assert "\n" not in str(caught.value)


def test_which_wheel_came_must_be_certain(index: Path, tmp_path: Path) -> None:
    (tmp_path / "other-1.0-py3-none-any.whl").touch()
    with pytest.raises(FileError, match="pip download ended with code 0"):
        wheels.download_wheel("tinydemo==1.0", tmp_path)
