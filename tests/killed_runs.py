"""Runs of `finetune` in processes of their own, which are killed where a test says: no cleaning up."""

import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

# What every run imports, imported once.
_IMPORTED = (
    "loracle.torch_impl.training",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
)

Place = Literal["step", "optimizer file", "rename", "removal", "output"]


@dataclass(frozen=True)
class Kill:
    """Where a process ends: when step ``step`` is done, or in the checkpoint of that step, or at the end.

    ``optimizer file``: in the middle of a checkpoint's largest file. ``rename``: before the checkpoint gets
    its name. ``removal``: when it has it, before the one before it is gone. ``output``: while the result is
    written.
    """

    place: Place
    step: int = 0


def run(options: dict[str, Any], kill: Kill | None = None, timeout: float = 60.0) -> int:
    """Run `finetune` with ``options`` in a new process and return its exit code, negative for a signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    process = context.Process(target=_child, args=(options, kill))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"no end after {timeout} s")
    return process.exitcode


def _child(options: dict[str, Any], kill: Kill | None) -> None:
    import torch

    from loracle.torch_impl import FinetuneOptions, finetune

    torch.set_num_threads(1)
    if kill is not None:
        _arm(kill)

    def progress(done: int, _: int, loss: float | None) -> None:
        if kill is not None and kill.place == "step" and done == kill.step and loss is not None:
            _die()

    finetune(FinetuneOptions(**options), progress)


def _die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _arm(kill: Kill) -> None:
    """Put death in the place of what the process would do next."""
    from loracle.torch_impl import checkpoints, results

    wanted = f"checkpoint-{kill.step}"
    if kill.place == "optimizer file":
        write = checkpoints.write_safetensors

        def half(path: Path, tensors: Any, metadata: Any = None) -> None:
            write(path, tensors, metadata)
            if path.parent.name.startswith(f".{wanted}."):
                os.truncate(path, path.stat().st_size // 2)
                _die()

        checkpoints.write_safetensors = half
    elif kill.place == "rename":
        rename = os.rename

        def instead(source: Any, target: Any) -> None:
            if Path(target).name == wanted:
                _die()
            rename(source, target)

        os.rename = instead  # type: ignore[assignment]
    elif kill.place == "removal":
        remove = checkpoints.discard

        def last(path: Path) -> None:
            if (path.parent / wanted).is_dir():
                _die()
            remove(path)

        checkpoints.discard = last
    elif kill.place == "output":
        results.loss_plot = _die
