"""A model's repeated layers: where they are, which of them are alike, and the model with a few of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .weightless import WeightlessModel

# How configurations say how many layers there are, and what they list for each layer.
_COUNTS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "layer_rope_theta")
_INDEX = "layer_idx"
_MODULE_STATE = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Stack:
    """The `nn.ModuleList` at `path`. Layers of equal `kinds` differ in nothing but weights and index; kinds
    are numbered as they first appear."""

    path: str
    kinds: tuple[int, ...]

    @property
    def samples(self) -> tuple[int, ...]:
        """The layers that stand for all: the first of each kind, then the second of each; three where there
        is one kind. So no kind that repeats is known from what follows the first layer alone."""
        places: dict[int, list[int]] = defaultdict(list)
        for layer, kind in enumerate(self.kinds):
            places[kind].append(layer)
        rounds = 3 if len(places) == 1 else 2
        return tuple(own[turn] for turn in range(rounds) for own in places.values() if turn < len(own))


class NotedInt(int):
    """A layer's index, or the number of layers, that notes in `used` what is computed from it.

    Equality and truth are not noted: dictionaries and defaults ask for them.
    """

    used: list[str]

    def __new__(cls, value: int, used: list[str]) -> NotedInt:
        """Return `value` that writes to `used`."""
        number = super().__new__(cls, value)
        number.used = used
        return number

    def __deepcopy__(self, _: dict[int, Any]) -> NotedInt:
        return self


def _noted(name: str) -> Callable[..., Any]:
    original = getattr(int, name)

    def method(self: NotedInt, *operands: Any) -> Any:
        self.used.append(name)
        return original(self, *operands)

    return method


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
for _name in (
    *_ARITHMETIC,
    *(f"r{own}" for own in _ARITHMETIC),
    "lt",
    "le",
    "gt",
    "ge",
    "neg",
    "float",
):
    setattr(NotedInt, f"__{_name}__", _noted(f"__{_name}__"))


def layer_paths(names: Iterable[str]) -> list[str]:
    """The dotted paths before the first number in the weights' `names`."""
    found = (re.match(r"(.+?)\.\d+\.", name) for name in names)
    return list(dict.fromkeys(match[1] for match in found if match))


def find_stacks(weightless: WeightlessModel) -> tuple[Stack, ...]:
    """The model's lists of layers that a few samples of them can stand for.

    There are none where it is not certain which layers are alike. An encoder and a decoder have one each.
    """
    model = weightless.model
    modules = dict(model.named_modules())
    groups = list(weightless.aliases.values())
    stacks = []
    for path in layer_paths(name for group in groups for name in group):
        layers = modules.get(path)
        if type(layers) is not nn.ModuleList or any(
            len({layer_of(path, name) for name in group}) > 1 for group in groups
        ):
            continue
        lists = _per_layer(weightless, len(layers))
        if lists is None:
            return ()
        kinds = _kinds(layers, lists)
        stack = Stack(path, kinds)
        if len(stack.samples) < len(kinds):
            stacks.append(stack)
    if not all(_alone(stack, modules, stacks) for stack in stacks):
        return ()
    if len(stacks) > 1 and any(_per_layer(weightless, len(stack.kinds)) for stack in stacks):
        return ()
    return tuple(stacks)


def keep_layers(weightless: WeightlessModel, stacks: Sequence[Stack]) -> tuple[WeightlessModel, list[str]]:
    """Leave in `weightless`, in place, only the samples of `stacks`, numbered anew.

    Returns the model, and a list that notes each time something is computed from a layer's index or from the
    number of layers.
    """
    used: list[str] = []
    for stack in stacks:
        parent, _, leaf = stack.path.rpartition(".")
        layers = weightless.model.get_submodule(stack.path)
        assert isinstance(layers, nn.ModuleList)
        for new, old in enumerate(stack.samples):
            for module in layers[old].modules():
                if vars(module).get(_INDEX) == old:
                    setattr(module, _INDEX, NotedInt(new, used))
        kept = nn.ModuleList([layers[old] for old in stack.samples])
        setattr(weightless.model.get_submodule(parent), leaf, kept)
    samples = {len(stack.kinds): stack.samples for stack in stacks}
    for config in _configs(weightless):
        changed: dict[str, Any] = {}
        for key in _PER_LAYER:
            values = getattr(config, key, None)
            if isinstance(values, list | tuple) and len(values) in samples:
                changed[key] = type(values)(values[old] for old in samples[len(values)])
        for key in _COUNTS:
            count = getattr(config, key, None)
            if count in samples:
                changed[key] = NotedInt(len(samples[count]), used)
        for key, value in changed.items():
            setattr(config, key, value)
    aliases: dict[str, tuple[str, ...]] = {}
    for group in weightless.aliases.values():
        renamed = _renamed(group, stacks)
        if renamed:
            aliases[renamed[0]] = renamed
    return replace(weightless, aliases=aliases), used


def layer_of(path: str, name: str) -> int | None:
    """The number of the layer of the list at `path` that `name` is in; None outside."""
    number, dot, _ = name.removeprefix(f"{path}.").partition(".")
    return int(number) if name.startswith(f"{path}.") and dot and number.isdecimal() else None


def renumber(path: str, name: str, layer: int) -> str:
    """`name`, which is in a layer, with another layer's number."""
    _, _, rest = name.removeprefix(f"{path}.").partition(".")
    return f"{path}.{layer}.{rest}"


def _renamed(group: tuple[str, ...], stacks: Sequence[Stack]) -> tuple[str, ...]:
    """A weight's names among the samples; none where its layer is not one."""
    for stack in stacks:
        layer = layer_of(stack.path, group[0])
        if layer is not None:
            if layer not in stack.samples:
                return ()
            return tuple(renumber(stack.path, name, stack.samples.index(layer)) for name in group)
    return group


def _alone(stack: Stack, modules: Mapping[str, nn.Module], stacks: Sequence[Stack]) -> bool:
    """Whether no other list goes along with a stack. Of its length there may be lists inside of layers, and
    the decoder's layers beside the encoder's, if as many of them are kept."""
    for path, module in modules.items():
        if not isinstance(module, nn.ModuleList | nn.ParameterList) or len(module) != len(stack.kinds):
            continue
        if path == stack.path or any(path.startswith(f"{other.path}.") for other in stacks):
            continue
        kept = [len(other.samples) for other in stacks if other.path == path]
        if {_half(path), _half(stack.path)} != {"encoder", "decoder"} or kept != [len(stack.samples)]:
            return False
    return True


def _half(path: str) -> str:
    return next((part for part in path.split(".") if part in ("encoder", "decoder")), "")


def _configs(weightless: WeightlessModel) -> list[PreTrainedConfig]:
    """Every configuration that the model's code may read: modules hold copies."""
    found = [weightless.config, *(getattr(module, "config", None) for module in weightless.model.modules())]
    return list({id(c): c for c in found if isinstance(c, PreTrainedConfig)}.values())


def _per_layer(weightless: WeightlessModel, count: int) -> list[Sequence[Any]] | None:
    """What the configurations list for each layer; None where a list may be of that kind and is not known."""
    found: list[Sequence[Any]] = []
    for config in _configs(weightless):
        for key, values in vars(config).items():
            if isinstance(values, list | tuple) and len(values) == count:
                if key not in _PER_LAYER:
                    return None
                found.append(values)
    return found


def _kinds(layers: nn.ModuleList, lists: Sequence[Sequence[Any]]) -> tuple[int, ...]:
    numbers: dict[Hashable, int] = {}
    kinds = []
    for index, layer in enumerate(layers):
        state = (_state(layer, index), tuple(repr(values[index]) for values in lists))
        kinds.append(numbers.setdefault(state, len(numbers)))
    return tuple(kinds)


def _state(layer: nn.Module, index: int) -> Hashable:
    """All that a layer's answers depend on but its parameters' values and its own index."""
    return tuple(
        (
            name,
            type(module),
            tuple(
                (key, None if key == _INDEX and value == index else _identity(value))
                for key, value in sorted(vars(module).items())
                if key not in _MODULE_STATE
            ),
            tuple((key, None if p is None else (p.shape, p.dtype)) for key, p in module._parameters.items()),
            tuple((key, None if b is None else _contents(b)) for key, b in module._buffers.items()),
        )
        for name, module in layer.named_modules()
    )


def _contents(buffer: torch.Tensor) -> Hashable:
    flat = buffer.detach().cpu().reshape(-1).contiguous()
    return (buffer.shape, buffer.dtype, flat.view(torch.uint8).numpy().tobytes())


def _identity(value: Any) -> Hashable:
    """Equal for values that do the same; two objects of which that is not known are different."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return (type(value), value)
    if isinstance(value, list | tuple):
        return (type(value), tuple(map(_identity, value)))
    if isinstance(value, dict):
        return (dict, tuple((key, _identity(own)) for key, own in value.items()))
    if isinstance(value, partial):
        return (partial, value.func, _identity(value.args), _identity(value.keywords))
    if isinstance(value, MethodType):
        return (MethodType, value.__func__, type(value.__self__))
    return (type(value), id(value))
