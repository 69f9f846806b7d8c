"""A mixture of experts as onnxruntime's operator, put at trace time into a transformers model.

`com.microsoft.MoE` takes the router's logits: their softmax p, the k largest, divided by their sum where the
model does that, and

    y = sum over these e of p[e] (silu(x G[e]^T) * (x U[e]^T)) D[e]^T

A row of G and a row of U stand in its first tensor in turn (`recipes.STACKED_IN_TURN`), (E, 2 I, H); D is
(E, H, I).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from loracle.reference import TargetError

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_PROBE_HIDDEN, _PROBE_INNER = 10, 6
_PROBE_INPUT = 2, 8
# Half of float32's digits: another function differs in the first.
_AGREEMENT = torch.finfo(torch.float32).eps ** 0.5


class _Routing(NamedTuple):
    """How many experts a token goes to, and whether their weights are divided by their sum."""

    k: int
    normalized: bool


class FusedRouter(nn.Module):
    """`x W^T`, (tokens, E), in the place of all that a router returns; W (E, H)."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        experts, width = self.weight.shape
        x = x.reshape(-1, width)
        logits = torch.onnx.ops.symbolic(
            "com.microsoft::FusedMatMul",
            (x, self.weight),
            {"transB": 1},
            dtype=x.dtype,
            shape=(x.shape[0], experts),
            version=1,
        )
        return logits, logits, logits


class FusedExperts(nn.Module):
    """The experts' operator on x (tokens, H) and the logits, which take the places of indices and weights."""

    def __init__(self, gate_up_proj: nn.Parameter, down_proj: nn.Parameter, routing: _Routing) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.routing = routing

    def forward(self, x: torch.Tensor, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        y: torch.Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MoE",
            (x, logits, self.gate_up_proj, None, self.down_proj),
            {
                "k": self.routing.k,
                "normalize_routing_weights": int(self.routing.normalized),
                "activation_type": "swiglu",
                "swiglu_fusion": 1,
                "activation_alpha": 1.0,
                "activation_beta": 0.0,
            },
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        return y


class _PlainRouter(FusedRouter):
    """What `FusedRouter` stands for, computed."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = functional.linear(x.reshape(-1, self.weight.shape[1]), self.weight)
        return logits, logits, logits


class _PlainExperts(FusedExperts):
    """What `FusedExperts` stands for, computed; rows as transformers has them: G, then U."""

    def forward(self, x: torch.Tensor, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        weights, chosen = logits.softmax(-1).topk(self.routing.k)
        if self.routing.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        gate, up = torch.einsum("th,eih->tei", x, self.gate_up_proj).chunk(2, -1)
        y = torch.einsum("tei,ehi->teh", functional.silu(gate) * up, self.down_proj)
        y = y.gather(1, chosen[:, :, None].expand(-1, -1, y.shape[-1]))
        return (y * weights[:, :, None]).sum(1)


@dataclass(frozen=True)
class _Mixture:
    """A module of `path` with a router and experts, by the names that it has for them."""

    path: str
    block: nn.Module
    router: str
    experts: str

    def replaced(
        self, block: nn.Module, routing: _Routing, router: type[FusedRouter], experts: type[FusedExperts]
    ) -> None:
        """Put other modules with the same parameters into `block`, in place."""
        own = block.get_submodule(self.experts)
        setattr(block, self.router, router(block.get_submodule(self.router).get_parameter("weight")))
        setattr(block, self.experts, experts(own.get_parameter(_GATE_UP), own.get_parameter(_DOWN), routing))


def fuse_experts(model: nn.Module) -> None:
    """Replace the experts of `model`, and what chooses among them, in place, by the forms above.

    Raises TargetError naming the module of which its own answers do not show that it is of that form.
    """
    for mixture in list(_mixtures(model)):
        routing = _routing_of(mixture)
        mixture.replaced(mixture.block, routing, FusedRouter, FusedExperts)


def _mixtures(model: nn.Module) -> Iterator[_Mixture]:
    for path, experts in model.named_modules():
        own = {name: p for name, p in experts._parameters.items() if p is not None}
        parent, _, leaf = path.rpartition(".")
        named = leaf == "experts" or _GATE_UP in own or _DOWN in own
        if not named or not any(parameter.dim() == 3 for parameter in own.values()):
            continue
        block = model.get_submodule(parent)
        down = own.get(_DOWN)
        routers = [
            name
            for name, module in block.named_children()
            if down is not None
            and set(dict(module.named_parameters())) == {"weight"}
            and module.get_parameter("weight").shape == down.shape[:2]
        ]
        if set(own) != {_GATE_UP, _DOWN} or len(routers) != 1:
            raise _refused(path, experts)
        yield _Mixture(parent, block, routers[0], leaf)


def _refused(path: str, module: nn.Module) -> TargetError:
    return TargetError(
        f"{path}: expected a router's softmax and experts silu(x G^T) * (x U^T) with a product after them, "
        f"got {type(module).__name__}, which answers otherwise; this model cannot be exported"
    )


def _routing_of(mixture: _Mixture) -> _Routing:
    """Return how a mixture chooses, as the answers of a small copy of it show."""
    generator = torch.Generator().manual_seed(0)
    block = _small(mixture, generator)
    experts = block.get_submodule(mixture.experts)
    x = torch.randn(*_PROBE_INPUT, experts.get_parameter(_DOWN).shape[1], generator=generator)
    numbers = {getattr(module, "top_k", None) for module in block.modules()}
    try:
        with torch.no_grad():
            answer = _states(block(x))
            for k, normalized in product(sorted(n for n in numbers if isinstance(n, int)), (True, False)):
                routing = _Routing(k, normalized)
                mixture.replaced(block, routing, _PlainRouter, _PlainExperts)
                if torch.allclose(_states(block(x)), answer, rtol=_AGREEMENT, atol=_AGREEMENT):
                    return routing
    except (RuntimeError, TypeError, ValueError):  # it takes or returns other things than states
        raise _refused(mixture.path, mixture.block) from None
    raise _refused(mixture.path, mixture.block)


def _states(answer: Any) -> torch.Tensor:
    states: torch.Tensor = answer[0] if isinstance(answer, tuple) else answer
    return states


def _small(mixture: _Mixture, generator: torch.Generator) -> nn.Module:
    """Return a copy of a mixture with few, random weights: the model's own are stand-ins of full size."""
    _, hidden, inner = mixture.block.get_submodule(mixture.experts).get_parameter(_DOWN).shape
    sizes = {inner: _PROBE_INNER, 2 * inner: 2 * _PROBE_INNER}
    sizes = {hidden: _PROBE_HIDDEN} | sizes
    memo: dict[int, Any] = {}
    for name, parameter in mixture.block.named_parameters():
        stacked = name.startswith(f"{mixture.experts}.") or name.startswith(f"{mixture.router}.")
        kept = 1 if stacked else 0  # the number of experts, which may be that of something else
        shape = (*parameter.shape[:kept], *(sizes.get(size, size) for size in parameter.shape[kept:]))
        memo[id(parameter)] = nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False)
    block = copy.deepcopy(mixture.block, memo)
    for module in block.modules():
        for key, value in vars(module).items():
            if type(value) is int and value in sizes and "expert" not in key and key != "top_k":
                setattr(module, key, sizes[value])
        config = getattr(module, "config", None)
        if config is not None:
            config._experts_implementation = "eager"
    return block.eval()
