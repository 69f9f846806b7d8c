"""An export as a command: Ctrl-C, a full or read-only disk, several at a time. Whole, or not there at all."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime
import pytest
from export_fixtures import SHAPE, make_adapter, make_model, write_tokenizer
from exports_at_once import wait_for
from mounts import FILLING, MOUNTING, mounted, skip_unless_mounting
from transformers import AutoModelForCausalLM, LlamaConfig

from loracle.export import export

Content = dict[str, bytes]


def content(folder: Path) -> Content:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def partials(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".partial")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and an adapter, `whole` an undisturbed export, which leaves the graph in the cache."""
    root = tmp_path_factory.mktemp("models")
    base = make_model(root / "base")
    make_adapter(root / "adapter", base)
    export(base, root / "whole", root / "adapter")
    return root


@pytest.fixture(scope="module")
def whole(models: Path) -> Content:
    onnxruntime.InferenceSession(models / "whole" / "model.onnx", providers=["CPUExecutionProvider"])
    return content(models / "whole")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `models`, with weights that take a while to write."""
    root = tmp_path_factory.mktemp("large")
    (root / "base").mkdir()
    shape = {**SHAPE, "vocab_size": 20_000, "hidden_size": 256}
    config = LlamaConfig(**shape, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "base")
    write_tokenizer(root / "base")
    make_adapter(root / "adapter", root / "base")
    export(root / "base", root / "whole", root / "adapter")
    return root


_HELD = """
import os, signal, time
from loracle.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sync, sleeps = os.fsync, iter([{}])
os.fsync = lambda descriptor: (time.sleep(next(sleeps, 0)), sync(descriptor))[1]
main()
"""


def command(models: Path, out: Path, *, held: int = 0) -> list[str]:
    """The command of an export, which sleeps for `held` seconds where it first waits for the disk.

    It heeds SIGINT also where these tests run in a shell's background, whose programs ignore it.
    """
    arguments = ["--model", str(models / "base"), "--adapter", str(models / "adapter"), "--out", str(out)]
    program = ["-c", _HELD.format(held)] if held else ["-m", "loracle.cli"]
    return [sys.executable, *program, "export", *arguments]


@contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def refusal(arguments: list[str]) -> str:
    """Run a command that must end with exit code 2 and one line, which is returned."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_ctrl_c_ends_a_command_with_130_and_leaves_nothing(tmp_path: Path, large: Path) -> None:
    with started(command(large, tmp_path / "out", held=60)) as process:
        wait_for(lambda: bool(partials(tmp_path)))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert (process.returncode, error) == (130, "error: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_what_a_living_process_writes_is_left_alone_and_the_first_to_end_wins(
    tmp_path: Path, large: Path
) -> None:
    out, whole = tmp_path / "out", content(large / "whole")
    with started(command(large, out, held=5)) as first:
        wait_for(lambda: bool(partials(tmp_path)))
        first.send_signal(signal.SIGSTOP)
        stopped = partials(tmp_path)
        assert len(stopped) == 1
        subprocess.run(command(large, out), capture_output=True, check=True)
        assert content(out) == whole
        assert partials(tmp_path) == stopped
        first.send_signal(signal.SIGCONT)
        _, error = first.communicate()
        assert first.returncode == 2
    assert error == f"error: {out}: exists and is not empty; choose another --out or remove it\n"
    assert content(out) == whole
    assert not partials(tmp_path)


def test_of_four_exports_at_once_one_succeeds_and_the_others_say_why(
    tmp_path: Path, models: Path, whole: Content
) -> None:
    out = tmp_path / "out"
    with (
        started(command(models, out)) as a,
        started(command(models, out)) as b,
        started(command(models, out)) as c,
        started(command(models, out)) as d,
    ):
        ended = [(process.communicate()[1], process.returncode) for process in (a, b, c, d)]
    assert sorted(code for _, code in ended) == [0, 2, 2, 2]
    message = f"error: {out}: exists and is not empty; choose another --out or remove it\n"
    assert all(error == message for error, code in ended if code == 2)
    assert content(out) == whole
    assert not partials(tmp_path)


@pytest.fixture(scope="module")
def may_mount() -> None:
    skip_unless_mounting()


@pytest.mark.usefixtures("may_mount")
def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, models: Path, whole: Content
) -> None:
    arguments = mounted(tmp_path, "size=128k", command(models, tmp_path / "out"))
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    needed = sum(len(data) for name, data in whole.items() if name != "genai_config.json")
    assert done.stderr == (
        f"error: {tmp_path}: expected {needed} bytes free, got {128 << 10}; "
        "free some space or choose another --out; nothing was written\n"
    )
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.usefixtures("may_mount")
def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path: Path, models: Path) -> None:
    out = tmp_path / "out"
    python, _, _, *options = command(models, out)
    arguments = mounted(tmp_path, "size=1m", [python, "-c", FILLING, *options])
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.stderr == (
        f"error: {out}: disk full (No space left on device); free some space, nothing was written\n"
    )
    assert (done.returncode, done.stdout) == (2, "filler\n")


def test_a_file_that_may_not_grow_leaves_nothing(tmp_path: Path, models: Path) -> None:
    out = tmp_path / "out"
    error = refusal(["sh", "-c", 'ulimit -f 200; exec "$@"', "sh", *command(models, out)])
    assert error == f"error: {out}: disk full (File too large); free some space, nothing was written\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("may_mount")
def test_a_read_only_disk_is_named_and_what_is_there_stays(tmp_path: Path, models: Path) -> None:
    before = 'mkdir "$0/old" && touch "$0/old/model.onnx" && mount -o remount,ro "$0" || exit 99; '
    for name, words in (("new", "cannot be written (Read-only file system "), ("old", "is not empty")):
        arguments = mounted(tmp_path, "size=1m", command(models, tmp_path / name), before)
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.stderr.startswith(f"error: {tmp_path / name}: ")
        assert words in done.stderr
        assert (done.returncode, done.stdout) == (2, "old\n")


def test_a_folder_without_permission_is_named(tmp_path: Path, models: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir(mode=0o555)
    arguments = command(models, parent / "out")
    if os.geteuid() == 0:  # permissions bind root only without this capability
        without = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", "--"]
        try:
            subprocess.run([*without, "true"], capture_output=True, check=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            pytest.skip(f"root's permissions cannot be taken away: {error}")
        arguments = [*without, *arguments]
    assert "cannot be written (Permission denied" in refusal(arguments)
    assert not list(parent.iterdir())


@pytest.mark.usefixtures("may_mount")
def test_a_mount_point_is_refused_with_a_folder_in_it_as_the_remedy(tmp_path: Path, models: Path) -> None:
    message = (
        f"error: {tmp_path}: a mount point, which cannot get its content in one step; "
        f"choose a folder in it, such as {tmp_path / 'model'}\n"
    )
    done = subprocess.run(
        mounted(tmp_path, "size=1m", command(models, tmp_path)), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    bound = [*MOUNTING, 'mount --bind "$0" "$0" && exec "$@"', str(tmp_path), *command(models, tmp_path)]
    assert refusal(bound) == message
    assert not list(tmp_path.iterdir())
