"""Exports in processes of their own, two of which write into one folder at a time."""

import os
import time
from collections.abc import Callable
from pathlib import Path

_TIMEOUT = 60.0


def wait_for(condition: Callable[[], bool]) -> None:
    """Return as soon as ``condition`` holds."""
    end = time.monotonic() + _TIMEOUT
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not so after {_TIMEOUT} s")
        time.sleep(0.001)


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
