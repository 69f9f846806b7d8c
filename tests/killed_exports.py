"""Exports in processes of their own, which can be killed at any step by which they change the disk."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

_IMPORTED = ("loracle.export.task_changes", "onnx", "pytest")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_TIMEOUT = 60.0

Work = Callable[[], object]


def run(root: Path, work: Work, kill: int | None = None) -> tuple[int, list[str]]:
    """Run ``work`` in a new process; return its exit code, negative for a signal, and its steps on the disk.

    Args:
        root: the folder whose changes are steps.
        work: to be pickled.
        kill: the number of the step before which the process ends.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, root, work, kill, os.environ["LORACLE_CACHE"]))
    process.start()
    theirs.close()
    steps = []
    try:
        while ours.poll(_TIMEOUT):
            steps.append(ours.recv())
    except EOFError:
        pass
    process.join(_TIMEOUT)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"no end after {_TIMEOUT} s")
    return process.exitcode, steps


def _child(pipe: Connection, root: Path, work: Work, kill: int | None, cache: str) -> None:
    os.environ["LORACLE_CACHE"] = cache
    from loracle.export import write

    count = 0

    def step(what: str) -> None:
        nonlocal count
        if count == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        pipe.send(what)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        named = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if named and str(arguments[0]).startswith(str(root)) and (event != "open" or arguments[2] & _WRITING):
            step(event)

    fsync, write_array = os.fsync, write.write_array

    def flushing(descriptor: int) -> None:
        step("fsync")
        fsync(descriptor)

    def writing(sink: Any, array: Any) -> None:
        step("tensor")
        write_array(sink, array)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", flushing)
        patch.setattr(write, "write_array", writing)
        sys.addaudithook(audit)
        work()
    pipe.close()


def wait_for(condition: Callable[[], bool]) -> None:
    """Return as soon as ``condition`` holds."""
    end = time.monotonic() + _TIMEOUT
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not so after {_TIMEOUT} s")
        time.sleep(0.001)


def replace_task(model: Path, adapter: Path, deployment: Path, name: str) -> None:
    """Exchange a task of a deployment for another adapter's."""
    from loracle.export.architecture import check_supported
    from loracle.export.graphs import graph_template
    from loracle.export.linked import write_linked
    from loracle.export.options import GraphOptions
    from loracle.export.task_document import task_document
    from loracle.files import Checkpoint, MergedWeights, read_adapter

    with Checkpoint(model) as checkpoint:
        read = read_adapter(adapter)
        weights = MergedWeights(checkpoint, read)
        task = check_supported(checkpoint.config, str(model / "config.json"))
        template = graph_template(checkpoint, checkpoint.config, task, GraphOptions(packed=False))
        document = task_document("linked", read, adapter)
        write_linked(template, weights, deployment, name, document=document, replace=True)


def add_beside_another(
    model: Path, adapter: Path, deployment: Path, name: str, cache: str, form: str = "linked"
) -> None:
    """Add a task to a deployment, and go on only when two processes are writing into it."""
    from loracle.export import export

    os.environ["LORACLE_CACHE"] = cache

    def progress(*_: int) -> None:
        (deployment.parent / f"{name} is writing").touch()
        wait_for(lambda: len(list(deployment.parent.glob("* is writing"))) == 2)

    export(model, deployment, adapter, form=form, name=name, progress=progress)


def export_in_place(model: Path, adapter: Path, form: str, cache: str) -> None:
    """Make a model's own folder a deployment with one task."""
    from loracle.export import export

    os.environ["LORACLE_CACHE"] = cache
    export(model, model, adapter, form=form, name="french", in_place=True)
