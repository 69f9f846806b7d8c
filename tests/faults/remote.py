"""Functions called in a process that has imported what writers need, and has no threads: it can fork."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import pytest

from . import notifications

IMPORTED = (
    "loracle.export.task_changes",
    "loracle.torch_impl.training",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "onnx",
    "pytest",
    "transformers.models.llama.modeling_llama",
)
T = TypeVar("T")


def skip_unless_held() -> None:
    """Skip where system calls cannot be held."""
    reason = call(notifications.available)
    if reason is not None:
        pytest.skip(reason)


def call(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """What a function returns in a new process. Raises RuntimeError with the traceback where it raises."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    ours, theirs = context.Pipe(duplex=False)
    environment = {name: os.environ[name] for name in ("LORACLE_CACHE",) if name in os.environ}
    process = context.Process(target=_child, args=(theirs, environment, function, arguments, options))
    process.start()
    theirs.close()
    try:
        ok, value = ours.recv()
    except EOFError:
        ok, value = False, "the process has ended without an answer"
    process.join()
    if not ok:
        raise RuntimeError(value)
    result: T = value
    return result


def _child(
    pipe: Connection,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    os.environ.update(environment)
    sys.dont_write_bytecode = True  # writers change what they are to change alone
    for name in IMPORTED:
        importlib.import_module(name)
    try:
        pipe.send((True, function(*arguments, **options)))
    except BaseException:  # noqa: BLE001 - the caller is told
        pipe.send((False, traceback.format_exc()))
