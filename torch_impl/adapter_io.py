"""A model's adapters as files in PEFT's format, and such files put into a model."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from loracle.files import Adapter, LoraPair, read_adapter, write_adapter
from loracle.files.adapter_checks import EMBEDDINGS
from loracle.files.parameters import name_parameters
from loracle.reference import TargetError

from .arrays import array_of, assign
from .heads import head_of
from .inject import inject_with_start
from .injected import InjectedAdapter, injected
from .kinds import factor_shapes
from .layer import DEFAULT
from .module_tree import base_modules
from .plain_config import plain_config
from .targets import Targets, resolve_targets
from .whole_tensors import WholeTensor, whole_tensors

_REMEDY = "is this adapter for another model?"


def adapter_of(model: nn.Module, adapter_name: str | None = None) -> Adapter:
    """Return copies of all that an adapter has trained, with its configuration.

    One that started as a part of W0 (PiSSA, OLoRA) comes as the ordinary adapter of twice the rank that it
    is beside the unchanged W0. Sharded parameters are gathered, by all processes at once.

    Args:
        model: with adapters.
        adapter_name: which one; the only one when None.

    Raises:
        TargetError: the model has no such adapter, or several and none is named.
    """
    name, adapter = injected(model).only(adapter_name)
    pairs = {path: layer.pair(name) for path, layer in adapter.layers.items()}
    tensors = {full: array_of(tensor.trained).copy() for full, tensor in adapter.whole.items()}
    others = _other_names(adapter.whole, base_modules(model))
    tensors |= {other: tensors[full] for other, full in others.items() if _is_written(other, adapter)}
    tokens = {path: adapter.tokens[path].rows(name) for path in adapter.targets.tokens}
    config = plain_config(adapter.targets.config, {path: pair.scaling for path, pair in pairs.items()})
    # A configuration states alpha; what it comes to must be what is in the layers.
    pairs = {
        path: LoraPair(pair.A, pair.B, config.scaling_of(path), pair.kind, pair.bias, pair.magnitude)
        for path, pair in pairs.items()
    }
    return Adapter(config, pairs, tensors, tokens, head_of(model) if tensors else None)


def save_adapter(model: nn.Module, folder: str | Path, adapter_name: str | None = None) -> None:
    """Write an adapter of the model to a new folder in PEFT's format; see `adapter_of` and
    `loracle.files.write_adapter`.
    """
    write_adapter(Path(folder), adapter_of(model, adapter_name))


def load_adapter(
    model: nn.Module, source: str | Path | Adapter, adapter_name: str = DEFAULT
) -> tuple[str, ...]:
    """Inject an adapter's layers into ``model``, fill them with its values, and activate it.

    Args:
        model: changed in place; untouched when an error is raised.
        source: a folder in PEFT's format, or an adapter that has been read.
        adapter_name: what to call it.

    Returns:
        The paths of the adapted layers.

    Raises:
        TargetError: a tensor has no layer in the model, or a targeted layer no tensor, or a shape differs;
            the message names the tensor and both shapes.
        FileError, ConfigError, NonFiniteError: see `loracle.files.read_adapter`.
    """
    adapter = source if isinstance(source, Adapter) else read_adapter(Path(source))
    adapter = _fitted(model, adapter)
    # Any start will do, as its numbers are replaced; from a generator of its own, so that torch's stays put.
    paths = inject_with_start(model, adapter.config, adapter_name, True, torch.Generator())
    fill(model, adapter, adapter_name)
    return paths


def fill(model: nn.Module, adapter: Adapter, adapter_name: str | None = None) -> None:
    """Copy an adapter's values into the layers and whole tensors that are there for it."""
    name, own = injected(model).only(adapter_name)
    for path, layer in own.layers.items():
        if path not in own.targets.tied:
            layer.fill(name, adapter.pairs[path])
    for path in own.targets.tokens:
        own.tokens[path].fill_rows(name, adapter.tokens[path])
    for full, tensor in own.whole.items():
        # Copied into: a tied or sharded tensor stays what it is.
        assign(tensor.trained, adapter.tensors[full].astype(array_of(tensor.trained).dtype), keep_dtype=True)


def _fitted(model: nn.Module, adapter: Adapter) -> Adapter:
    """Return the adapter with its stacked parameters named and without copies of the base's own tensors.

    Raises:
        TargetError: it does not fit the model.
    """
    modules = base_modules(model)
    targets = resolve_targets(model, adapter.config)
    order: dict[str, list[str]] = defaultdict(list)
    for full in targets.parameters:
        path, _, parameter = full.rpartition(".")
        order[path].append(parameter)
    adapter = name_parameters(adapter, {path: tuple(names) for path, names in order.items()})
    expected = {*targets.modules, *targets.parameters, *targets.tied}
    for path, pair in adapter.pairs.items():
        base = modules.get(path)
        if path not in targets.parameters and base is None:
            raise TargetError(f"{path}: expected a layer of the model, got no such module; {_REMEDY}")
        if path not in expected:
            raise TargetError(
                f"{path}: expected only layers that target_modules names and that can be adapted, got lora_A "
                f"and lora_B for another, {type(base).__name__}; {_REMEDY}"
            )
        owner = base if base is not None else modules[path.rpartition(".")[0]]
        parameter = "" if base is not None else path.rpartition(".")[2]
        shapes = factor_shapes(owner, adapter.config.rank_of(path), parameter)
        for tensor_name, array, shape in zip(("lora_A", "lora_B"), (pair.A, pair.B), shapes, strict=True):
            if array.shape != shape:
                raise TargetError(
                    f"{path}.{tensor_name}: expected shape {shape} for this {type(owner).__name__}, "
                    f"got {array.shape}; {_REMEDY}"
                )
    for path in (*targets.modules, *targets.parameters):
        if path not in adapter.pairs:
            raise TargetError(f"{path}: expected lora_A and lora_B for this target, got neither; {_REMEDY}")
    _check_tied(adapter, targets, modules)
    _check_tokens(adapter, targets, modules)
    return _without_copies(adapter, targets, modules)


def _check_tied(adapter: Adapter, targets: Targets, modules: dict[str, nn.Module]) -> None:
    """Check that what an adapter has for a tied weight is one update, written once for each place."""
    for path, owner in targets.tied.items():
        if path not in adapter.pairs:
            continue
        A, B = adapter.pairs[path].A, adapter.pairs[path].B
        if not isinstance(modules[path], nn.Embedding):
            A, B = B.T, A.T
        if not (np.array_equal(A, adapter.pairs[owner].A) and np.array_equal(B, adapter.pairs[owner].B)):
            raise TargetError(
                f"{path}: expected the update of {owner}, whose weight it shares, got another; one weight "
                "can't have two: train with ensure_weight_tying, or untie the model first"
            )


def _check_tokens(adapter: Adapter, targets: Targets, modules: dict[str, nn.Module]) -> None:
    for path in adapter.tokens:
        if path not in targets.tokens:
            raise TargetError(
                f"{path}: expected rows of {', '.join(targets.tokens) or 'no layer'} by "
                f"trainable_token_indices, got rows of another; {_REMEDY}"
            )
    for path, indices in targets.tokens.items():
        weight = modules[path].weight
        assert isinstance(weight, torch.Tensor)
        shape = (len(indices), weight.shape[1])
        rows = adapter.tokens.get(path)
        if rows is None or rows.shape != shape:
            found = "none" if rows is None else f"shape {rows.shape}"
            raise TargetError(
                f"{path}: expected rows of shape {shape} for trainable_token_indices, got {found}; {_REMEDY}"
            )


def _without_copies(adapter: Adapter, targets: Targets, modules: dict[str, nn.Module]) -> Adapter:
    """Check the whole tensors; drop those that equal the base's own, which PEFT writes beside embeddings."""
    expected = whole_tensors(modules, (*targets.modules, *targets.tied), targets.config)
    others = _other_names(expected, modules)
    base = dict(_named_tensors(modules))
    kept = {}
    for full, array in adapter.tensors.items():
        own = base.get(full)
        if own is None or tuple(own.shape) != array.shape:
            found = "no such tensor" if own is None else f"shape {tuple(own.shape)}"
            raise TargetError(
                f"{full}: expected shape {array.shape} in the model, got {found}; resize this model's "
                f"vocabulary if that was done; {_REMEDY}"
            )
        if full in expected:
            kept[full] = array
        elif full in others:
            _check_other_name(adapter, full, others[full])
        elif not np.array_equal(array_of(own).astype(np.float64), array.astype(np.float64)):
            raise TargetError(
                f"{full}: expected the model's own values, got others for a tensor that the adapter's config "
                "does not train; put them into the model first, or name the module in modules_to_save if "
                f"they were trained; {_REMEDY}"
            )
    for full in expected:
        if full not in kept:
            raise TargetError(f"{full}: expected a tensor that the config trains, got none; {_REMEDY}")
    return replace(adapter, tensors=kept)


def _other_names(whole: Mapping[str, WholeTensor], modules: dict[str, nn.Module]) -> dict[str, str]:
    """Return further names of tensors that are trained whole, in tied modules, and the names they go by."""
    paths: dict[int, str] = {}
    for path, module in modules.items():
        paths.setdefault(id(module), path)
    names = {
        f"{paths[id(place.module)]}.{place.attribute}": full
        for full, tensor in whole.items()
        for place in tensor.places
    }
    return {other: full for other, full in names.items() if other not in whole}


def _is_written(name: str, adapter: InjectedAdapter) -> bool:
    """Whether a tied tensor's other name belongs into a file, as PEFT has it of embeddings."""
    path = name.rpartition(".")[0]
    return adapter.targets.config.saves(path) or path.rpartition(".")[2] in EMBEDDINGS


def _check_other_name(adapter: Adapter, other: str, full: str) -> None:
    if full not in adapter.tensors or not np.array_equal(adapter.tensors[other], adapter.tensors[full]):
        raise TargetError(
            f"{other}: expected the values of {full}, to which it is tied, got others; one tensor can't be "
            "two: untie the model first"
        )


def _named_tensors(modules: dict[str, nn.Module]) -> list[tuple[str, torch.Tensor]]:
    return [
        (f"{path}.{name}" if path else name, tensor)
        for path, module in modules.items()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]
