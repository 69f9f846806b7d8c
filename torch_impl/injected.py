"""What has been injected into a model: the adapters by name, and which of them count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from loracle.reference import TargetError

from .layer import LoraLayer
from .module_tree import layers_of, wrappers
from .targets import Targets
from .token_rows import TokenRows
from .whole_tensors import WholeTensor, trainable

_ATTRIBUTE = "_loracle_injected"


@dataclass(frozen=True, eq=False)
class InjectedAdapter:
    """One adapter of a model.

    Attributes:
        targets: its configuration, resolved against the model.
        layers: its layers by path, in the model's order; stacked parameters by their full names.
        whole: the tensors that are trained whole, by name.
        tokens: the layers some of whose rows are trained, by path; those of tied weights share theirs.
    """

    targets: Targets
    layers: Mapping[str, LoraLayer]
    whole: Mapping[str, WholeTensor]
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)

    @property
    def placed(self) -> dict[str, LoraLayer]:
        """All layers that the adapter has something in, by path."""
        return {**self.layers, **self.tokens}


@dataclass(eq=False)
class Injected:
    """The adapters of a model; kept with it."""

    adapters: dict[str, InjectedAdapter] = field(default_factory=dict)
    active: tuple[str, ...] = ()

    def only(self, name: str | None) -> tuple[str, InjectedAdapter]:
        """Return the named adapter, or the one there is.

        Raises:
            TargetError: it is not there, or none is named of several.
        """
        known = ", ".join(self.adapters)
        if name is None and len(self.adapters) != 1:
            raise TargetError(f"adapter_name: expected one of {known}, got None; name it")
        name = next(iter(self.adapters)) if name is None else name
        if name not in self.adapters:
            raise TargetError(f"adapter_name: expected one of {known}, got {name!r}; name one of them")
        return name, self.adapters[name]

    def activate(self, names: Sequence[str]) -> None:
        """Let the named adapters count: their updates, and their whole tensors in the base's places.

        Raises:
            TargetError: one is not there, or two have a whole tensor for one place, or rows of one.
            ConfigError: two that a layer can't have at once; see `LoraLayer.check_active`.
        """
        owners: dict[int, str] = {}
        for name in names:
            _, adapter = self.only(name)
            for tensor_name, tensor in adapter.whole.items():
                other = owners.setdefault(id(tensor.original), name)
                if other != name:
                    raise TargetError(
                        f"{tensor_name}: expected one active adapter that trains it whole, got {other} and "
                        f"{name}; activate one of them"
                    )
        for adapter in self.adapters.values():
            for path, layer in adapter.placed.items():
                layer.check_active(names, path)
        self._check_rows(names)
        for adapter in self.adapters.values():
            trainable(adapter.whole, False)
            for tensor in adapter.whole.values():
                tensor.put(trained=False)
        for name in names:
            adapter = self.adapters[name]
            trainable(adapter.whole, True)
            for tensor in adapter.whole.values():
                tensor.put(trained=True)
        for layer in {id(own): own for a in self.adapters.values() for own in a.placed.values()}.values():
            layer.activate(names)
        self.active = tuple(names)

    def _check_rows(self, names: Sequence[str]) -> None:
        """Check that no active adapter trains rows of what another trains whole."""
        rows = {
            id(layer.base_layer): (path, name)
            for name in names
            for path, layer in self.adapters[name].tokens.items()
        }
        for name in names:
            for full, tensor in self.adapters[name].whole.items():
                for place in tensor.places:
                    if id(place.module) in rows and place.attribute == "weight":
                        path, other = rows[id(place.module)]
                        raise TargetError(
                            f"{full}: expected one active adapter that trains it, got {name}, and {other} "
                            f"with trained rows of {path}; activate one of them"
                        )


def injected(model: nn.Module) -> Injected:
    """Return what `inject` or `load_adapter` has kept with the model.

    Raises:
        TargetError: the model has no adapters.
    """
    state = getattr(model, _ATTRIBUTE, None)
    if not isinstance(state, Injected):
        raise TargetError(f"{type(model).__name__}: expected a model with adapters, got none; inject() first")
    return state


def injected_or_new(model: nn.Module) -> Injected:
    """Return what is kept with the model, or a new, empty one that is not kept yet."""
    state = getattr(model, _ATTRIBUTE, None)
    return state if isinstance(state, Injected) else Injected()


def keep(model: nn.Module, state: Injected) -> None:
    """Keep the state with the model."""
    setattr(model, _ATTRIBUTE, state)


def forget(model: nn.Module) -> None:
    """Drop the state, if there is one."""
    if hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the model's adapted layers by path, in the model's order.

    Those of stacked parameters have the parameters' full names.
    """
    found: dict[str, LoraLayer] = {}
    for path, wrapper in wrappers(model).items():
        found |= layers_of(wrapper, path)
    return found
