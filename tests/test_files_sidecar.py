"""The files that travel with the weights: a fixed list, and nothing from outside the model's folder."""

import os
from pathlib import Path

import pytest

from loracle.files import copy_sidecars, sidecar_bytes
from loracle.files.sidecar import SIDECARS
from loracle.reference import FileError


def _folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("m", "out"):
        (tmp_path / name).mkdir()
    return tmp_path / "m", tmp_path / "out"


def test_the_listed_files_are_copied_byte_for_byte_and_no_others(tmp_path: Path) -> None:
    model, out = _folders(tmp_path)
    for number, name in enumerate(SIDECARS):
        (model / name).write_bytes(bytes([number, 255, 10]))
    for name in ("model.safetensors", "pytorch_model.bin", "modeling_evil.py", "README.md", ".git"):
        (model / name).write_bytes(b"x")
    assert copy_sidecars(model, out) == SIDECARS
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        name: bytes([number, 255, 10]) for number, name in enumerate(SIDECARS)
    }
    assert all(not (out / name).stat().st_mode & 0o111 for name in SIDECARS)


def test_missing_and_excluded_files_are_left_out(tmp_path: Path) -> None:
    model, out = _folders(tmp_path)
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    assert copy_sidecars(model, out, exclude=("config.json",)) == ("tokenizer.json",)
    assert [path.name for path in out.iterdir()] == ["tokenizer.json"]


def test_links_into_the_hubs_blobs_and_within_the_folder_are_followed(tmp_path: Path) -> None:
    snapshot, blobs, out = tmp_path / "repo/snapshots/rev", tmp_path / "repo/blobs", tmp_path / "out"
    for folder in (snapshot, blobs, out):
        folder.mkdir(parents=True)
    (blobs / "abc").write_bytes(b"blob")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    (snapshot / "vocab.json").symlink_to("tokenizer.json")
    (tmp_path / "link").symlink_to(snapshot)
    assert copy_sidecars(tmp_path / "link", out) == ("tokenizer.json", "vocab.json")
    assert not (out / "tokenizer.json").is_symlink()
    assert (out / "vocab.json").read_bytes() == b"blob"


@pytest.mark.parametrize(
    ("model", "place"),
    [
        ("deep/m", "deep/secret"),
        ("deep/m", "secret"),
        ("deep/m", "blobs/secret"),
        ("repo/snapshots/rev", "repo/refs/secret"),
        ("repo/snapshots/rev", "repo/blobs/deep/secret"),
        ("repo/snapshots/rev", "repo/blobsecret"),
    ],
)
def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path, model: str, place: str) -> None:
    folder, secret, out = tmp_path / model, tmp_path / place, tmp_path / "out"
    for parent in (folder, secret.parent, out):
        parent.mkdir(parents=True, exist_ok=True)
    secret.write_text("secret")
    (folder / "tokenizer.json").symlink_to(os.path.relpath(secret, folder))
    with pytest.raises(FileError, match=r"tokenizer\.json: links to .*outside the model's folder"):
        copy_sidecars(folder, out)
    assert not list(out.iterdir())


def test_pipes_and_dangling_links_are_refused(tmp_path: Path) -> None:
    model, out = _folders(tmp_path)
    os.mkfifo(model / "vocab.txt")
    with pytest.raises(FileError, match="pipe"):
        copy_sidecars(model, out)
    (model / "vocab.txt").unlink()
    (model / "config.json").symlink_to("nowhere")
    with pytest.raises(FileError, match=r"config\.json: cannot be read"):
        copy_sidecars(model, out)


def test_the_bytes_of_what_is_copied_are_known_before(tmp_path: Path) -> None:
    model, out = _folders(tmp_path)
    assert sidecar_bytes(model) == 0
    (model / "config.json").write_bytes(b"123")
    (model / "real").write_bytes(b"12345")
    (model / "tokenizer.json").symlink_to("real")
    (model / "LICENSE").symlink_to("missing")
    (model / "README.md").write_bytes(b"1")
    assert sidecar_bytes(model) == 8
    (model / "LICENSE").unlink()
    copy_sidecars(model, out)
    assert sum(path.stat().st_size for path in out.iterdir()) == 8
