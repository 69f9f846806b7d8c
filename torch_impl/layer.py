"""What every adapted layer has in common: a frozen base, named adapters beside it, an explicit merge."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loracle.files import LoraPair
from loracle.reference import ConfigError, ShapeError, TargetError

from .arrays import array_of, assign, tensor_of
from .dropout import SeededDropout, drawn_dropout, multiplier
from .function_rules import compute_dtype
from .update import LoraUpdate, UpdateOptions, check_adapter_name

DEFAULT = "default"
"""The name that an adapter has when none is given, PEFT's."""


class LoraLayer(nn.Module):
    """A frozen layer with low-rank updates beside it, of which those of the active adapters count.

    The wrapped layer is kept as ``base_layer`` (the same object, not a copy). Neither ``forward`` nor
    ``train()`` nor ``eval()`` merges: `set_merged` and `restore_base` do, and ``merged`` tells.

    A kind of layer says how an adapter starts (`start`), what it computes (`forward`), how its update is
    written to a file (`pair`) and what its weights are when merged (`merged_arrays`).
    """

    kind: str
    """As in `loracle.files.LoraPair`."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        base_layer.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self._active: tuple[str, ...] = ()
        # The base layer's own parameters while merged ones are in their place; in a plain dict, so that
        # nn.Module does not register them a second time.
        self._kept: dict[str, nn.Parameter | None] = {}

    @abstractmethod
    def start(self, options: UpdateOptions, generator: torch.Generator | None) -> LoraUpdate:
        """Return a new adapter's tensors."""

    @abstractmethod
    def merged_arrays(self, names: Sequence[str], label: str) -> dict[str, NDArray[Any]]:
        """Return the base layer's parameters with the named adapters merged in, each rounded once.

        Args:
            names: of adapters this layer has.
            label: the layer's path, for error messages.
        """

    def start_merge(self, names: Sequence[str], label: str) -> Callable[[], Mapping[str, Tensor]]:
        """Start what `merged_arrays` does; return what gives its result as tensors on the base's device.

        A kind of layer that merges on its device launches the work here, and waits for it there.
        """
        arrays, device = self.merged_arrays(names, label), self.base_weight.device
        return lambda: {name: tensor_of(array).to(device) for name, array in arrays.items()}

    def merges_surely(self, names: Sequence[str]) -> bool:
        """Whether the result of `start_merge` is known to be no error, by less work than to compute it."""
        return False

    @property
    def weight(self) -> Tensor:
        """The weight that ``base_layer`` holds now: W0, or the merged one while ``merged``."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias that ``base_layer`` holds now."""
        return cast(Tensor | None, getattr(self.base_layer, "bias", None))

    @property
    def base_weight(self) -> Tensor:
        """W0, merged or not."""
        return cast(Tensor, self._kept.get("weight", self.weight))

    @property
    def merged(self) -> bool:
        """Whether ``base_layer`` holds merged weights, and forward is the base's alone."""
        return bool(self._kept)

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the adapters that count, in the order in which they were activated."""
        return self._active

    @property
    def updates(self) -> list[LoraUpdate]:
        """What the active adapters have here."""
        # Not by `update`: forward reads this, and nn.Module's way to a submodule takes as long as a product.
        adapters = cast(dict[str, LoraUpdate], self.adapters._modules)
        return [adapters[name] for name in self._active if name in adapters]

    def update(self, name: str = DEFAULT) -> LoraUpdate:
        """Return what the named adapter has here.

        Raises:
            TargetError: it has nothing in this layer.
        """
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise TargetError(f"{name}: expected an adapter of this layer, got another name; it has {known}")
        return cast(LoraUpdate, self.adapters[name])

    def add_adapter(
        self, name: str, options: UpdateOptions, generator: torch.Generator | None = None
    ) -> None:
        """Give the layer a new adapter, which is not active yet.

        Raises:
            ConfigError: the name is taken or no name, or the layer can't do what the options ask for.
            TargetError: the layer is merged.
        """
        if check_adapter_name(name) in self.adapters:
            raise ConfigError(f"adapter_name: expected a new one, got {name!r}; choose another")
        if self.merged:
            raise TargetError("LoraLayer: expected an unmerged layer, got a merged one; unmerge it first")
        self.adapters[name] = self.start(options, generator)
        # A layer put into a model in evaluation must not drop anything.
        self.train(self.base_layer.training)

    def remove_adapter(self, name: str) -> None:
        """Take an adapter away, if it is there."""
        if name in self.adapters:
            del self.adapters[name]
        self._active = tuple(other for other in self._active if other != name)

    def check_active(self, names: Sequence[str], label: str) -> None:
        """Check that the named adapters, those that this layer has, can count at once.

        Raises:
            ConfigError: several, and one has a magnitude: what the norm would be then is not defined.
        """
        own = [name for name in names if name in self.adapters]
        rescaling = [name for name in own if self.update(name).lora_magnitude_vector is not None]
        if rescaling and len(own) > 1:
            raise ConfigError(
                f"use_dora: expected the one active adapter of {label}, got {rescaling[0]} among "
                f"{', '.join(own)}; activate one of them"
            )

    def activate(self, names: Sequence[str]) -> None:
        """Let the named adapters count, those that this layer has; the others' tensors do not train.

        Raises:
            ConfigError: see `check_active`.
        """
        self.check_active(names, "the layer")
        self._active = tuple(name for name in names if name in self.adapters)
        for name, update in self.adapters.items():
            update.requires_grad_(name in self._active)

    def pair(self, name: str) -> LoraPair:
        """Return the named adapter's tensors as arrays of their own, in the shapes of PEFT's files."""
        update = self.update(name)
        A, B = update.matrices()
        bias, magnitude = (
            None if tensor is None else array_of(tensor).copy()
            for tensor in (update.lora_bias, update.lora_magnitude_vector)
        )
        return LoraPair(
            array_of(A).copy(),
            array_of(B).copy(),
            update.scaling,
            kind=self.kind,
            bias=bias,
            magnitude=magnitude,
        )

    def fill(self, name: str, pair: LoraPair) -> None:
        """Give the named adapter the values of a pair, which has the shapes of `LoraUpdate.matrices`."""
        update = self.update(name)
        A, B = pair.A, pair.B
        if update.start is not None:
            r = update.options.r
            start_A, minus_start_B = update.start
            assign(start_A, A[r:])
            assign(minus_start_B, B[:, r:])
            A, B = A[:r], B[:, :r]
        for tensor, array in (
            (update.lora_A, A),
            (update.lora_B, B),
            (update.lora_bias, pair.bias),
            (update.lora_magnitude_vector, pair.magnitude),
        ):
            if tensor is not None and array is not None:
                assign(tensor, array)

    def _draw(self, update: LoraUpdate, x: Tensor) -> SeededDropout | Tensor | None:
        """Return what the adapter's input x is multiplied with; None for one."""
        p = update.options.dropout
        if not self.training or p == 0.0:
            return None
        # A compiled graph has no generators of its own; it draws and keeps masks as its compiler sees fit.
        return multiplier(x, p, compute_dtype(x)) if torch.compiler.is_compiling() else drawn_dropout(p)

    def set_merged(self, parameters: Mapping[str, Tensor]) -> None:
        """Put parameters in the base layer's place for its own, and keep those for `restore_base`.

        The parameter objects are exchanged, so a module that W0 is tied to keeps W0.

        Raises:
            TargetError: the layer is merged already.
            ShapeError: one differs from the base layer's own in shape or dtype.
        """
        if self.merged:
            raise TargetError("LoraLayer: expected an unmerged layer, got a merged one; unmerge it first")
        for name, tensor in parameters.items():
            own = getattr(self.base_layer, name)
            if own is not None and (tensor.shape != own.shape or tensor.dtype is not own.dtype):
                raise ShapeError(
                    f"{name}: expected {tuple(own.shape)} {own.dtype}, got {tuple(tensor.shape)} "
                    f"{tensor.dtype}; merge this layer's own adapters"
                )
        for name, tensor in parameters.items():
            self._kept[name] = getattr(self.base_layer, name)
            setattr(self.base_layer, name, nn.Parameter(tensor, requires_grad=False))

    def forget_base(self) -> None:
        """Let go of the base layer's own parameters for good; no adapter counts any more."""
        self._kept = {}
        self.activate(())

    def restore_base(self) -> None:
        """Put the base layer's own parameters back, the same objects with the same bits."""
        for name, parameter in self._kept.items():
            setattr(self.base_layer, name, parameter)
        self._kept = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast the kept parameters with the module's."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter in self._kept.values():
            if parameter is not None:
                parameter.data = fn(parameter.data)
        return self

    def extra_repr(self) -> str:
        """Describe the state in ``print(model)``."""
        return f"active={', '.join(self._active) or 'none'}, merged={self.merged}"
