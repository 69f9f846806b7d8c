"""A model whose parameters are a point of a random subspace; its d numbers are all that is trained."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loracle.reference import ConfigError

from .layers import number_layers
from .projection import ProjectionName, make_projection, project


class SubspaceModel(nn.Module):
    """``theta_D = theta_0 + P theta_d`` in the place of the parameters; see `loracle.reference.Subspace`.

    theta_D has every parameter of the model, a classifier's head among them, in the order of
    ``model.named_parameters()``; a tied one is there once. `theta_d` is the only one that is trained. The
    model's own parameters are theta_0 and stay what they are; it is called with others in their place.

    Args:
        model: float32; its parameters are frozen.
        projection: see `ProjectionName`; with ``"said"`` the last m numbers of theta_d are the layers'
            scales, which start at one.
        d: numbers of theta_d.
        seed: of P.

    Raises:
        ConfigError: d is out of range for the model.
    """

    theta_d: nn.Parameter

    def __init__(self, model: nn.Module, projection: ProjectionName, d: int, seed: int) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        own = dict(model.named_parameters())
        self._shapes: dict[str, torch.Size] = {name: parameter.shape for name, parameter in own.items()}
        self._sizes = [parameter.numel() for parameter in own.values()]
        numbers, layers = number_layers(own)
        self.layers: tuple[str, ...] = layers if projection == "said" else ()
        self._numbers = numbers
        total = sum(self._sizes)
        check_dimension(d, total, len(self.layers))
        device = next(iter(own.values())).device
        self._inner = d - len(self.layers)
        self.projection = make_projection(projection, total, self._inner, seed).to(device)
        start = torch.cat([torch.zeros(self._inner), torch.ones(len(self.layers))])
        self.theta_d = nn.Parameter(start.to(device))
        self._fixed: tuple[Tensor, dict[str, Tensor]] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns with the parameters of `theta_d`."""
        return functional_call(self.model, self._now(), args, kwargs)

    def parameters_now(self) -> dict[str, Tensor]:
        """Return theta_D as parameters by name; they have gradients with respect to `theta_d`."""
        update = project(self.projection, self.theta_d[: self._inner])
        parts = torch.split(update, self._sizes)
        if self.layers:
            scales = self.theta_d[self._inner :].unbind()
            parts = tuple(part * scales[at] for part, at in zip(parts, self._numbers, strict=True))
        start: Mapping[str, Tensor] = dict(self.model.named_parameters())
        return {
            name: start[name] + part.view(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def _now(self) -> dict[str, Tensor]:
        """Return `parameters_now`; without gradients, those of the last call while `theta_d` is the same."""
        if torch.is_grad_enabled():
            self._fixed = None
            return self.parameters_now()
        if self._fixed is None or not torch.equal(self._fixed[0], self.theta_d):
            self._fixed = (self.theta_d.detach().clone(), self.parameters_now())
        return self._fixed[1]

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.theta_d.device

    def set_attn_implementation(self, name: str) -> None:
        """As the model's."""
        setter: Any = self.model.set_attn_implementation
        setter(name)


def check_dimension(d: int, D: int, lambdas: int) -> None:
    """Raises ConfigError where theta_d cannot have d numbers: lambdas, at least one more, and at most D."""
    if not lambdas < d <= D:
        reason = f", of which {lambdas} are the layers' scales" if lambdas else ""
        raise ConfigError(
            f"dims: expected numbers from {lambdas + 1} to {D}, the model's parameters{reason}, got {d}; "
            "leave it out"
        )
