"""Rotary position embedding left to the attention operator: tables instead of angles at trace time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loracle.reference import TargetError

Tables = tuple[torch.Tensor, torch.Tensor]

_WIDTHS = 8


class RotaryTables(nn.Module):
    """Stands for a model's rotary module: answers with cos and sin of every position, (positions, half), for
    each kind of layer; kind None where there is one."""

    def __init__(self, tables: Mapping[str | None, Tables]) -> None:
        super().__init__()
        self._numbers = {kind: number for number, kind in enumerate(tables)}
        for number, (cos, sin) in enumerate(tables.values()):
            self.register_buffer(f"cos_{number}", cos)
            self.register_buffer(f"sin_{number}", sin)

    def forward(self, x: torch.Tensor, position_ids: Any = None, layer_type: str | None = None) -> Tables:
        """Return the tables of a kind of layer, whatever the positions."""
        number = self._numbers[layer_type]
        return getattr(self, f"cos_{number}"), getattr(self, f"sin_{number}")


@torch.no_grad()
def _tables(rotary: Any, positions: int, dtype: torch.dtype) -> dict[str | None, Tables]:
    """Return the rotary module's own cos and sin, computed in float32 and rounded once."""
    form = rotary.rope_type
    kinds = [kind for kind, own in form.items() if own is not None] if isinstance(form, dict) else [None]
    x, at = torch.zeros(1, 1, 1, dtype=torch.float32), torch.arange(positions)[None]
    found = {}
    for kind in kinds:
        cos, sin = rotary(x, at) if kind is None else rotary(x, at, kind)
        half = cos.shape[-1] // 2
        found[kind] = cos[0, :, :half].to(dtype).contiguous(), sin[0, :, :half].to(dtype).contiguous()
    return found


def with_tables(model: nn.Module, positions: int, dtype: torch.dtype) -> bool:
    """Put `RotaryTables` in place of the model's rotary modules, if the operator can rotate by them.

    It takes tables whose width is a multiple of `_WIDTHS`. Returns whether it does; where it does not the
    model is left as it is, and rotates by itself.
    """
    found = {
        path: _tables(module, positions, dtype)
        for path, module in model.named_modules()
        if type(module).__name__.endswith("RotaryEmbedding")
    }
    widths = [cos.shape[1] for tables in found.values() for cos, _ in tables.values()]
    if not widths or any(width % _WIDTHS for width in widths):
        return False
    for path, tables in found.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, RotaryTables(tables))
    return True


@contextmanager
def rotation_by(model: nn.Module, note: Callable[[Tables], None]) -> Iterator[None]:
    """Within the block the modelling file's `apply_rotary_pos_emb` hands query and key through unrotated and
    gives the tables to `note`, for the attention operator that follows rotates by them.

    Raises TargetError where the modelling file has no such function.
    """
    modeling = sys.modules[type(model).__module__]
    if not hasattr(modeling, "apply_rotary_pos_emb"):
        raise TargetError(
            f"{type(model).__name__}: expected a module-level apply_rotary_pos_emb, found none; "
            "this architecture cannot be exported with fused attention"
        )
    original = modeling.apply_rotary_pos_emb

    def unrotated(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        note((cos, sin))
        return q, k

    modeling.apply_rotary_pos_emb = unrotated  # type: ignore[attr-defined]
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb = original  # type: ignore[attr-defined]
