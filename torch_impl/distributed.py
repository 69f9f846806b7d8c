"""The processes of one run: who they are, what they tell each other, and how they end together.

A launcher (``torchrun``, ``accelerate launch``, or any that sets ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``,
``MASTER_ADDR`` and ``MASTER_PORT``) starts one process a device; without one a run is one process.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from loracle.reference import ConfigError, LoracleError

T = TypeVar("T")

_BUCKET = 2**24
"""Numbers that are reduced at once, 64 MiB of float32: what a reduction takes besides the gradients."""


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees it.

    Attributes:
        rank: this process's number, from 0; rank 0 writes, logs and reports.
        size: processes in all.
        device: what this process computes on.
        control: the group that small messages go through, on the CPU; None in a world of one.
    """

    rank: int
    size: int
    device: torch.device
    control: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return every process's ``value``, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, value: T | None) -> T | None:
        """Return rank 0's ``value``."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def sum(self, *values: float) -> tuple[float, ...]:
        """Return the sum over all processes of each of ``values``, in float64: counts stay exact."""
        if self.size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.control)
        return tuple(sums.tolist())

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error that one process meets in the block in all of them, at the block's end.

        For errors of `loracle` alone: any other ends its process, and the launcher the others.
        """
        mine: LoracleError | None = None
        try:
            yield
        except LoracleError as error:
            mine = error
        reports = self.gather(None if mine is None else (type(mine), str(mine)))
        if mine is not None:
            raise mine
        for rank, report in enumerate(reports):
            if report is not None:
                kind, message = report
                raise kind(f"rank {rank}: {message}")

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put the sum over all processes in the place of each gradient; what has none anywhere keeps none.

        Sharded parameters are left out: `shard` has theirs summed. One reduction after the last backward
        pass, of a few megabytes, costs less than `DistributedDataParallel`'s hooks and wrapper; and a
        parameter that one process's batch did not reach needs no search of the graph.
        """
        if self.size == 1:
            return
        plain = [parameter for parameter in parameters if not hasattr(parameter, "device_mesh")]
        if not plain:
            return
        reached = torch.tensor([parameter.grad is not None for parameter in plain], dtype=torch.int32)
        dist.all_reduce(reached, group=self.control)
        for bucket in _buckets(
            [parameter for parameter, count in zip(plain, reached.tolist(), strict=True) if count]
        ):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            parts = torch.split(flat, [gradient.numel() for gradient in gradients])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view(parameter.shape)


def is_main() -> bool:
    """Whether this process is the one that reports, by what the launcher says."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def joined() -> Iterator[World]:
    """Yield the world that the launcher made, joined; a group that is there already is used and kept.

    Raises:
        ConfigError: the launcher asks for a sharding of its own.
    """
    # accelerate's own plugin would wrap the model as well.
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise ConfigError("ACCELERATE_USE_FSDP: expected a launch without --use_fsdp; say --fsdp to loracle")
    cuda = torch.cuda.is_available()
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, torch.device("cuda" if cuda else "cpu"))
        return
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    control = dist.new_group(backend="gloo")
    try:
        yield World(dist.get_rank(), size, device, control)
    finally:
        # All of them, where they are ours.
        dist.destroy_process_group(None if ours else control)


def shard(model: nn.Module, world: World) -> None:
    """Divide every parameter over the processes (FSDP2, ``fully_shard``), a transformer block at a time.

    Frozen weights and adapters keep their dtypes: a block gathers both, whatever they are, and gradients,
    which are the adapters' alone, are summed in theirs. What a product is computed in is autocast's choice,
    as without sharding; a policy of FSDP's would round the adapters.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    blocks = blocks_of(model)
    for unit in (*blocks, model):
        sharded = fully_shard(unit, mesh=mesh)
        # The loss is divided by the tokens of all processes: gradients are to be summed.
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_gradient_divide_factor(1.0)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the model's transformer blocks: what transformers says not to split, else members of lists."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    named = [module for module in model.modules() if type(module).__name__ in names]
    if named:
        return named
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def defer_sums(model: nn.Module, defer: bool) -> None:
    """Say whether the next backward passes leave a sharded model's gradients unsummed; others ignore it."""
    setter = getattr(model, "set_requires_gradient_sync", None)
    if setter is not None:
        setter(not defer)


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        fits = buckets and parameter.numel() <= room and parameter.dtype is buckets[-1][-1].dtype
        if not fits:
            buckets.append([])
            room = _BUCKET
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets
