"""Outputs that cannot be: a file, a full folder, a link to nowhere, a name too long. All is as before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from deployments import add, make_models
from faults.disk import Tree, read_tree
from mounts import mounted, skip_unless_mounting
from torch_fixtures import upper_pairs, write_lines, write_model

from loracle.export import export
from loracle.files import read_adapter, write_adapter, write_atomic
from loracle.files.merged_checkpoint import write_merged_checkpoint
from loracle.reference import FileError
from loracle.torch_impl import FinetuneOptions, finetune

Write = Callable[[Path, Path], object]


def fine_tune(inputs: Path, out: Path) -> None:
    finetune(FinetuneOptions(model=str(inputs / "llama"), data=inputs / "pairs.jsonl", out=out, max_steps=1))


WRITES: Mapping[str, Write] = {
    "adapter": lambda inputs, out: write_adapter(out, read_adapter(inputs / "attention")),
    "merge": lambda inputs, out: write_merged_checkpoint(inputs / "base", inputs / "attention", out),
    "export": lambda inputs, out: export(inputs / "base", out, inputs / "attention"),
    "task": lambda inputs, out: add(inputs, out, "french", "linked"),
    "fine-tuning": fine_tune,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_models(tmp_path_factory.mktemp("models"))
    write_model(root / "llama")
    write_lines(root / "pairs.jsonl", upper_pairs(4))
    return root


def refused(write: Write, inputs: Path, root: Path, out: Path) -> str:
    """The error of a writer, of one line; nothing in `root` has changed."""
    before = read_tree(root)
    with pytest.raises(FileError) as caught:
        write(inputs, out)
    assert read_tree(root) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def taken(root: Path, kind: str) -> tuple[Path, str]:
    """An output that cannot be, and what must be said of it."""
    out = root / "out"
    if kind == "a file":
        out.write_bytes(b"precious")
    elif kind == "a full folder":
        (out / "precious").mkdir(parents=True)
    elif kind == "a link to a full folder":
        (root / "precious" / "folder").mkdir(parents=True)
        out.symlink_to("precious")
        return out, f"{root / 'precious'}: exists and is not empty"
    elif kind == "a link to nowhere":
        out.symlink_to("missing/folder")
        return out, f"{root / 'missing'} does not exist"
    elif kind == "a link to itself":
        out.symlink_to("out")
    elif kind == "in a missing folder":
        return root / "missing" / "out", f"{root / 'missing'} does not exist"
    elif kind == "in a file":
        out.write_bytes(b"precious")
        return out / "in", f"{out} does not exist"
    elif kind == "a name too long":
        long = root / ("n" * 256)
        return long, f"{long}: cannot be an output (File name too long)"
    elif kind == "no name":
        return Path(f"{root}/a\0b"), "cannot be an output (embedded null"
    return out, f"{out}: "


TAKEN = (
    *("a file", "a full folder", "a link to a full folder", "a link to nowhere", "a link to itself"),
    *("in a missing folder", "in a file", "a name too long", "no name"),
)


@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.parametrize("name", WRITES)
def test_an_output_that_cannot_be_is_refused(inputs: Path, tmp_path: Path, name: str, kind: str) -> None:
    out, said = taken(tmp_path, kind)
    assert said in refused(WRITES[name], inputs, tmp_path, out)


@pytest.mark.parametrize("name", WRITES)
def test_it_is_refused_before_anything_is_written(
    inputs: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name too long is no late surprise: by the time of the rename hours may have gone."""
    made: list[str] = []
    monkeypatch.setattr(os, "mkdir", lambda path, *_: made.append(str(path)))
    refused(WRITES[name], inputs, tmp_path, tmp_path / ("n" * 256))
    assert not made


@pytest.mark.parametrize("name", WRITES)
def test_the_longest_name_and_a_link_to_an_empty_folder_are_written(
    inputs: Path, tmp_path: Path, name: str
) -> None:
    # beside its output a run keeps checkpoints, in a folder whose name is longer
    out = tmp_path / ("n" * (255 - len(".checkpoints") * (name == "fine-tuning")))
    WRITES[name](inputs, out)
    whole = read_tree(out)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    WRITES[name](inputs, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert read_tree(tmp_path / "empty").keys() == whole.keys()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["a name too long", "no name", "in a missing folder"])
def test_a_file_that_cannot_be_is_refused(tmp_path: Path, kind: str) -> None:
    out, said = taken(tmp_path, kind)
    assert said in refused(lambda _, out: write_atomic(out, b""), tmp_path, tmp_path, out)


READ_ONLY = 'mount -o remount,ro "$0" || exit 99; '


@pytest.mark.parametrize(("before", "said"), [("", "bytes free, got"), (READ_ONLY, "Read-only file system")])
def test_a_merge_into_a_full_or_read_only_disk_is_refused(
    inputs: Path, tmp_path: Path, before: str, said: str
) -> None:
    """In a process of its own, as a user does it: one line and exit code 2."""
    skip_unless_mounting()
    out = tmp_path / "out"
    options = ["--model", str(inputs / "base"), "--adapter", str(inputs / "attention"), "--out", str(out)]
    arguments = [sys.executable, "-m", "loracle.cli", "merge", *options]
    size = "128k" if not before else "4m"
    done = subprocess.run(
        mounted(tmp_path, f"size={size}", arguments, before), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr


def test_a_tree_is_read_with_its_links(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"held")
    (tmp_path / "link").symlink_to("folder")
    expected: Tree = {"folder/": b"", "folder/file": b"held", "link": b"folder"}
    assert read_tree(tmp_path) == expected
