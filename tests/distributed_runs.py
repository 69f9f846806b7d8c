"""Runs of `finetune` by two processes on this machine, started as a launcher starts them.

``python distributed_runs.py FOLDER NAME ...`` runs the scenarios called so one after the other, in a group of
processes made once, and leaves what became of each in ``FOLDER/<NAME>.<rank>.json``.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LEARNING: dict[str, Any] = {
    "rank": 2,
    "targets": "all-linear",
    "max_steps": 20,
    "lr": 0.01,
    "bf16": False,
    "save_steps": 0,
}
ROWS = 8
"""Examples a step in all."""


def launch(folder: Path, *names: str, kill_at: int = 0, timeout: float = 120.0) -> list[int]:
    """Run scenarios in two processes and return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), *names]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "KILL_AT": str(kill_at)},
        )
        for rank in range(2)
    ]
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def outcome(folder: Path, name: str) -> list[dict[str, Any]]:
    """What a scenario left, by rank."""
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2)]


def _options(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    data = folder / "data.jsonl"
    return {
        **LEARNING,
        "model": str(folder / "model"),
        "data": data,
        "eval_data": data,
        "eval_steps": 20,
        "out": folder / name,
        "batch_size": ROWS // 2,
        **changes,
    }


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def _run(folder: Path, name: str, rank: int) -> dict[str, Any]:
    """Run a scenario and return its outcome."""
    from loracle.reference import LoracleError
    from loracle.torch_impl import FinetuneOptions, finetune, trainer
    from loracle.torch_impl.distributed import World

    def run(**changes: Any) -> dict[str, Any]:
        seen: list[int] = []

        def progress(done: int, _: int, loss: float | None) -> None:
            seen.append(done)

        try:
            result = finetune(FinetuneOptions(**_options(folder, name, **changes)), progress)
        except LoracleError as error:
            return {"error": type(error).__name__, "message": str(error)}
        return {"losses": result.losses, "world_size": result.world_size, "seen": len(seen)}

    def mean_of_means(world: World, *values: float) -> tuple[float, ...]:
        # Each process divides by its own labels, and the mean of both is taken.
        if isinstance(values[0], int):
            return (values[0] * world.size,)
        return total(world, *values)

    def same_half(self: Any, draws: Sequence[Any]) -> tuple[list[Any], bool]:
        return [self._data.rows[draw] for draw in draws[:: self._world.size]], True

    total = World.sum
    scenarios: dict[str, Callable[[], dict[str, Any]]] = {
        "replicated": run,
        "sharded": lambda: run(fsdp=True),
        "accumulated": lambda: run(batch_size=ROWS // 4, gradient_accumulation=2),
        "accumulated and sharded": lambda: run(batch_size=ROWS // 4, gradient_accumulation=2, fsdp=True),
        "bfloat16": lambda: run(model=str(folder / "half"), bf16=True),
        "bfloat16 sharded": lambda: run(model=str(folder / "half"), bf16=True, fsdp=True),
        "checkpointed and sharded": lambda: run(gradient_checkpointing=True, fsdp=True),
        "one missing": lambda: run(data=folder / ("data.jsonl" if rank == 0 else "absent.jsonl")),
        "one other": lambda: run(data=folder / ("data.jsonl" if rank == 0 else "other.jsonl")),
        "diverging": lambda: run(lr=1e38),
        "resumed": lambda: run(fsdp=True, save_steps=3, resume=True, dropout=0.1, early_stopping_patience=5),
        "resumed whole": lambda: run(fsdp=True, save_steps=0, dropout=0.1, early_stopping_patience=5),
    }
    if name == "wrong divisor":
        with _replaced(World, "sum", mean_of_means):
            return run()
    if name == "same data":
        with _replaced(trainer.AdapterTrainer, "_drawn", same_half):
            return run()
    return scenarios[name]()


def _armed(kill_at: int, rank: int) -> None:
    """End the process when it has taken so many steps."""
    import signal

    from loracle.torch_impl.trainer import AdapterTrainer

    step = AdapterTrainer._step

    def last(self: Any) -> Any:
        done = step(self)
        if done.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    AdapterTrainer._step = last  # type: ignore[method-assign]


def main() -> None:
    """See the module."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    rank = int(os.environ["RANK"])
    if os.environ["KILL_AT"] != "0":
        _armed(int(os.environ["KILL_AT"]), rank)
    dist.init_process_group("gloo")
    for name in names:
        left = _run(folder, name, rank)
        (folder / f"{name}.{rank}.json").write_text(json.dumps(left))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
