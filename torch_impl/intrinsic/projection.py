"""The projections of `loracle.reference` in torch: the same numbers, on any device, with their transposes."""

from typing import Any, Literal, Protocol, cast, get_args

import torch
from torch import Tensor, nn

from loracle.reference import ConfigError, Fastfood, dense_projection
from loracle.reference.fastfood import block_length, fastfood_panels

from .hadamard import walsh_hadamard

ProjectionName = Literal["auto", "dense", "fastfood", "said"]
"""How d numbers become D. ``auto``: dense up to `DENSE` numbers, else Fastfood; ``said``: as ``auto``, with
the layers' scales among the d."""

PROJECTIONS: tuple[ProjectionName, ...] = get_args(ProjectionName)

DENSE = 2**24
"""Numbers of a matrix, 64 MiB of float32, up to which ``auto`` takes it."""

_MOST = 2**31
"""Numbers of a matrix that is asked for by name, 8 GiB."""


class Projection(Protocol):
    """P, (D, d), and its transpose; a module, so that it moves with the model."""

    def forward_numbers(self, theta: Tensor) -> Tensor:
        """Return ``P theta``, (D,), of theta, (d,)."""

    def adjoint_numbers(self, gradient: Tensor) -> Tensor:
        """Return ``P^T gradient``, (d,), of a gradient, (D,)."""


class DenseProjection(nn.Module):
    """`loracle.reference.DenseProjection`: a matrix, (D, d), float32."""

    matrix: Tensor

    def __init__(self, D: int, d: int, seed: int) -> None:
        super().__init__()
        matrix = torch.from_numpy(dense_projection(D, d, seed).matrix)
        self.register_buffer("matrix", matrix, persistent=False)

    def forward_numbers(self, theta: Tensor) -> Tensor:
        """See `Projection`."""
        return torch.mv(self.matrix, theta)

    def adjoint_numbers(self, gradient: Tensor) -> Tensor:
        """See `Projection`."""
        return torch.mv(self.matrix.T, gradient)


class _Panel(nn.Module):
    """Some of the blocks of a Fastfood projection, (n, L)."""

    signs: Tensor
    order: Tensor
    gaussians: Tensor

    def __init__(self, numbers: Fastfood) -> None:
        super().__init__()
        self.rows, self.columns = numbers.shape
        blocks, length = numbers.signs.shape
        # Within the panel as one row, so that all its blocks are permuted at once.
        starts = torch.arange(blocks, dtype=torch.int32)[:, None] * length
        order = torch.from_numpy(numbers.order) + starts
        self.register_buffer("signs", torch.from_numpy(numbers.signs), persistent=False)
        self.register_buffer("order", order.reshape(-1), persistent=False)
        self.register_buffer("gaussians", torch.from_numpy(numbers.gaussians), persistent=False)

    def forward_numbers(self, padded: Tensor) -> Tensor:
        """Return the panel's rows of ``P theta``, of theta and zeros, (L,)."""
        mixed = walsh_hadamard(self.signs * padded)
        moved = mixed.view(-1).index_select(0, self.order).view(self.signs.shape)
        return walsh_hadamard(moved.mul_(self.gaussians)).view(-1)[: self.rows]

    def adjoint_numbers(self, gradient: Tensor) -> Tensor:
        """Return the panel's share of ``P^T gradient`` before it is cut, (L,), of its rows, (rows,)."""
        missing = self.signs.numel() - self.rows
        blocks = nn.functional.pad(gradient, (0, missing)).view(self.signs.shape)
        mixed = walsh_hadamard(blocks).mul_(self.gaussians).view(-1)
        moved = torch.empty_like(mixed).index_copy_(0, self.order.long(), mixed)
        return walsh_hadamard(moved.view(self.signs.shape)).mul_(self.signs).sum(dim=0)


class FastfoodProjection(nn.Module):
    """`loracle.reference.Fastfood`, panel by panel: O(D) numbers are kept, a panel's beside them in use."""

    def __init__(self, D: int, d: int, seed: int) -> None:
        super().__init__()
        self._columns, self._length = d, block_length(d)
        self.panels = nn.ModuleList(_Panel(numbers) for numbers in fastfood_panels(D, d, seed))

    def forward_numbers(self, theta: Tensor) -> Tensor:
        """See `Projection`."""
        padded = nn.functional.pad(theta, (0, self._length - self._columns))
        return torch.cat([panel.forward_numbers(padded) for panel in self._panels()])

    def adjoint_numbers(self, gradient: Tensor) -> Tensor:
        """See `Projection`."""
        panels = self._panels()
        parts = torch.split(gradient, [panel.rows for panel in panels])
        shares = [panel.adjoint_numbers(part) for panel, part in zip(panels, parts, strict=True)]
        return torch.stack(shares).sum(dim=0)[: self._columns]

    def _panels(self) -> list[_Panel]:
        return [cast(_Panel, panel) for panel in self.panels]


def make_projection(name: ProjectionName, D: int, d: int, seed: int) -> DenseProjection | FastfoodProjection:
    """Return P, (D, d), on the CPU; see `ProjectionName`.

    Raises:
        ConfigError: the name, d or the seed is out of range, or the matrix too large.
    """
    if name not in PROJECTIONS:
        raise ConfigError(f"projection: expected one of {', '.join(PROJECTIONS)}, got {name!r}")
    if name == "dense":
        check_dense(D, d)
    kind = DenseProjection if is_dense(name, D, d) else FastfoodProjection
    return kind(D, d, seed)


def is_dense(name: ProjectionName, D: int, d: int) -> bool:
    """Whether P is a matrix that is kept."""
    return name == "dense" or (name != "fastfood" and D * d <= DENSE)


def check_dense(D: int, d: int) -> None:
    """Raises ConfigError where a matrix (D, d) is too large to be kept."""
    if D * d > _MOST:
        raise ConfigError(
            f"projection: expected at most {_MOST} numbers of a dense P, got {D} x {d}; say fastfood"
        )


def project(projection: DenseProjection | FastfoodProjection, theta: Tensor) -> Tensor:
    """Return ``P theta``, (D,), of theta, (d,); the gradient is that of the transpose, whatever autocast."""
    result: Tensor = _Project.apply(theta, projection)  # type: ignore[no-untyped-call]
    return result


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, projection: Projection) -> Tensor:
        ctx.projection = projection
        with torch.autocast(theta.device.type, enabled=False):
            return projection.forward_numbers(theta)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(gradient.device.type, enabled=False):
            return ctx.projection.adjoint_numbers(gradient), None
