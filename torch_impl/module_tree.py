"""A model's modules, by the paths they had before anything was injected, and what is in their places."""

from collections.abc import Iterator

from torch import nn

from .layer import LoraLayer
from .read_weights import LoraModule


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's modules by path as they were before anything was injected, in the model's order.

    A module that occurs twice has both its paths.
    """
    return {path: _base(module) for path, module in _tree(model, "")}


def wrappers(model: nn.Module) -> dict[str, LoraLayer | LoraModule]:
    """Return what stands in the place of a module of the model, by that module's path, in the model's order.

    One that occurs twice has its first path.
    """
    found: dict[int, tuple[str, LoraLayer | LoraModule]] = {}
    for path, module in _tree(model, ""):
        if isinstance(module, LoraLayer | LoraModule):
            found.setdefault(id(module), (path, module))
    return dict(found.values())


def layers_of(wrapper: LoraLayer | LoraModule, path: str) -> dict[str, LoraLayer]:
    """Return the layers of what stands at ``path``, by their own paths."""
    if isinstance(wrapper, LoraLayer):
        return {path: wrapper}
    return {f"{path}.{name}" if name else path: layer for name, layer in wrapper.lora_layers().items()}


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place that ``path`` names in the model as it was before anything was injected."""
    owner = model
    *outer, name = path.split(".")
    for component in outer:
        owner = _base(getattr(owner, component))
    setattr(owner, name, module)


def _tree(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module with its path, what stands in its place where that is so."""
    yield path, module
    for name, child in _base(module)._modules.items():
        if child is not None:
            yield from _tree(child, f"{path}.{name}" if path else name)


def _base(module: nn.Module) -> nn.Module:
    while isinstance(module, LoraLayer | LoraModule):
        module = module.base_layer
    return module
