"""AdamW over everything that trains, with the learning rates of LoRA+, and clipping by the global norm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loracle.reference import AdamWOptions, loraplus_rates

from .embedding import LoraEmbedding

GROUPS = ("A", "embedding", "B", "B_no_decay")
"""The parameter groups, as PEFT's ``create_loraplus_optimizer`` makes them."""


@dataclass(frozen=True)
class LoraPlus:
    """LoRA+: B learns at ``ratio`` times A's rate, both matrices of an embedding at ``embedding``.

    Source: LoRA+, arXiv 2402.12354; see `loracle.reference.loraplus_rates`.
    """

    ratio: float
    embedding: float = 1e-6


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what has a gradient, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return the trained parameters by name, divided into `GROUPS`.

    ``B`` has every ``lora_B`` and every vector (magnitudes, biases); of these, biases and the parameters of
    a layer norm are in ``B_no_decay``. ``embedding`` has both matrices of an adapter on an embedding. ``A``
    has every other matrix.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {name: {} for name in GROUPS}
    embedding = {
        id(matrix)
        for module in model.modules()
        if isinstance(module, LoraEmbedding)
        for update in module.adapters.values()
        for matrix in (update.lora_A, update.lora_B)
    }
    norms = {path for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    for name, parameter in trained_parameters(model).items():
        if id(parameter) in embedding or "lora_embedding_" in name:
            group = "embedding"
        elif "lora_B" in name or parameter.dim() == 1:
            decays = "bias" not in name and name.rpartition(".")[0] not in norms
            group = "B" if decays else "B_no_decay"
        else:
            group = "A"
        groups[group][name] = parameter
    return groups


class AdapterOptimizer:
    """``torch.optim.AdamW`` over `parameter_groups`; each update is `loracle.reference.adamw_step`.

    Without LoRA+ every group learns at ``options.lr``. The state is known by the parameters' names, so that
    it can be written, and read into a model that is sharded in another way.

    Args:
        model: its trained parameters are updated in place.
        options: learning rate of A, betas, eps and weight decay.
        loraplus: learning rates of the other groups.
    """

    def __init__(self, model: nn.Module, options: AdamWOptions, loraplus: LoraPlus | None = None) -> None:
        rates = loraplus_rates(
            options.lr,
            1.0 if loraplus is None else loraplus.ratio,
            options.lr if loraplus is None else loraplus.embedding,
        )
        groups = {name: group for name, group in parameter_groups(model).items() if group}
        rate_of = {"A": rates.A, "embedding": rates.embedding, "B": rates.B, "B_no_decay": rates.B}
        self._names = {name: parameter for group in groups.values() for name, parameter in group.items()}
        self._rates = [rate_of[name] for name in groups]
        # Fused: one pass over the numbers, where plain operations make ten.
        self.adamw = torch.optim.AdamW(
            [
                {
                    "params": list(group.values()),
                    "lr": rate_of[name],
                    "weight_decay": 0.0 if name == "B_no_decay" else options.weight_decay,
                }
                for name, group in groups.items()
            ],
            betas=options.betas,
            eps=options.eps,
            fused=True,
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is updated, in the order of the groups."""
        return list(self._names.values())

    def step(self, factor: float) -> None:
        """Update once, every learning rate multiplied by ``factor``, and drop the gradients."""
        for group, rate in zip(self.adamw.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Return copies of steps and moments on the CPU, by ``<parameter>/<name>``; empty before a step.

        Where parameters are sharded this is a collective operation.
        """
        return {
            f"{name}/{key}": whole(value).detach().cpu().clone()
            for name, parameter in self._names.items()
            for key, value in self.adamw.state.get(parameter, {}).items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put `state` back, sharded as the parameters are."""
        for key, value in state.items():
            name, _, entry = key.rpartition("/")
            parameter = self._names[name]
            placed = value.to(parameter.device, copy=True) if value.dim() == 0 else like(value, parameter)
            self.adamw.state[parameter][entry] = placed


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is sharded over devices as one, which is a collective operation; others as is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return a copy of ``value``, the same on every rank, on the device and in the shards of ``tensor``."""
    mesh: Any = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return value.to(tensor.device, copy=True)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(tensor, DTensor)
    # Every rank has the whole value: each takes its part, nothing is sent.
    placed: Tensor = distribute_tensor(value.to(tensor.device), mesh, tensor.placements, src_data_rank=None)
    return placed


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Return the 2-norm of all gradients as one vector, and scale them to at most ``max_norm`` in place.

    See `loracle.reference.clip_by_global_norm`; a ``max_norm`` of 0 leaves them alone. Where parameters are
    sharded this is a collective operation.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients))
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)
