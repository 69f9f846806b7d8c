"""Pages of a folder's files are let go of, and what has been written into a mapping stays."""

import mmap
from pathlib import Path

import pytest
from export_fixtures import make_model

from loracle.export import DecoderSession, export, mapped_pages, open_session
from loracle.export.mapped_pages import release_mapped

SIZE = 64 * mmap.PAGESIZE

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="needs Linux")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a model" / "a data file"
    path.parent.mkdir()
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


def mapped(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        held = mmap.mmap(file.fileno(), SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    assert sum(held[::256]) == 0  # every page is touched
    return held


def test_pages_are_let_go_of_and_read_again(file: Path) -> None:
    with mapped(file) as held:
        assert release_mapped(file.parent) == SIZE
        assert release_mapped(file.parent) == 0
        assert held[:] == file.read_bytes()


def test_every_mapping_of_the_folder_is_found_and_no_other(file: Path, tmp_path: Path) -> None:
    second = file.parent / "another"
    other = tmp_path / "a model of others" / "a data file"
    other.parent.mkdir()
    for path in (second, other):
        path.write_bytes(file.read_bytes())
    with mapped(file), mapped(file), mapped(second), mapped(other):
        assert release_mapped(file.parent) == 3 * SIZE
        assert release_mapped(other.parent) == SIZE


def test_what_was_written_into_a_mapping_stays(file: Path) -> None:
    with mapped(file) as held:
        held[5] = 77
        assert release_mapped(file.parent) == 0
        assert held[5] == 77


def test_a_link_s_target_is_meant(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(file.parent)
    with mapped(file):
        assert release_mapped(tmp_path / "link") == SIZE


def test_nothing_happens_where_the_system_tells_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_pages, "_MAPS", tmp_path / "none")
    with mapped(file):
        assert release_mapped(file.parent) == 0


def test_a_session_keeps_no_page_that_it_has_laid_out_anew(tmp_path: Path) -> None:
    export(make_model(tmp_path / "base"), tmp_path / "onnx")
    session = open_session(tmp_path / "onnx")
    assert release_mapped(tmp_path / "onnx") == 0
    decoder = DecoderSession(session, 8)
    expected = decoder.prefill([[1, 2, 3]]).copy()
    release_mapped(tmp_path / "onnx")
    assert (decoder.prefill([[1, 2, 3]]) == expected).all()
