"""The head that an adapter trained whole, and what it makes of a checkpoint: its names and configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.reference import DTypeError, ShapeError, TargetError

from .adapter import Adapter
from .architectures import CLASS_ENDS, HeadedClass, architecture_of
from .checkpoint import OUTPUT_EMBEDDINGS, Tensors, is_module
from .head_config import HeadConfig, labels_of
from .lora_pair import FLOATS

_LABELS = 2
"""How many labels a configuration of transformers has that does not say it."""


@dataclass(frozen=True, eq=False)
class Head:
    """A class's head, of which the adapter brings tensors.

    Attributes:
        sources: the names of the merged model's tensors that the checkpoint holds, and its names for them: as
            the class has them. What another class's head needs alone is left out.
        new: tensors of the adapter that the checkpoint lacks, or has for other outputs, by the class's names.
        config: the keys of ``config.json`` that the head changes, with None for those that go.
    """

    sources: Mapping[str, str]
    new: Mapping[str, NDArray[Any]]
    config: Mapping[str, Any]


def plan_head(checkpoint: Tensors, adapter: Adapter) -> Head | None:
    """Return what the adapter's head makes of the checkpoint; None where the adapter has none.

    A tensor counts as one of the head where ``modules_to_save`` names its module and the class has it beside
    its body. The class is the one that the adapter's folder names, else the one of its ``task_type``, else
    that of the checkpoint's ``config.json``; its ``model_type`` must be one of `ARCHITECTURES`.

    Raises:
        TargetError: a module of the head is neither in the checkpoint nor in the adapter.
        ShapeError: there are more or fewer labels than outputs.
        DTypeError: a tensor of the head is not a floating-point one.
    """
    architecture = architecture_of(checkpoint.config)
    if architecture is None:
        return None
    headed = _headed_class(checkpoint, adapter)
    if headed is None:
        return None
    trained = {
        name: array
        for name, array in adapter.tensors.items()
        if _within(name, headed.modules) and _saved(adapter, name)
    }
    if not trained:
        return None
    sources = _sources(checkpoint, headed, architecture.prefix)
    body = f"{architecture.prefix}."
    new = {
        name: array
        for name, array in trained.items()
        if name not in sources
        or (not name.startswith(body) and array.shape != checkpoint.shape(sources[name]))
    }
    for name, array in new.items():
        if array.dtype not in FLOATS:
            raise DTypeError(
                f"{name}: expected a floating-point tensor of the head, got {array.dtype}; "
                f"train the adapter again"
            )
    for module in headed.modules:
        if not any(_within(name, (module,)) for name in (*sources, *new)):
            raise TargetError(
                f"{module}: expected in the model or in the adapter, as {headed.name} has it, got neither; "
                f"train the adapter with it in modules_to_save"
            )
    return Head(sources, new, _config(checkpoint, adapter, headed, trained))


def _headed_class(checkpoint: Tensors, adapter: Adapter) -> HeadedClass | None:
    architecture = architecture_of(checkpoint.config)
    assert architecture is not None
    by_name = {headed.name: headed for headed in architecture.heads.values()}
    named = None if adapter.head is None else adapter.head.architecture
    if named in by_name:
        return by_name[named]
    end = CLASS_ENDS.get(adapter.config.task_type or "")
    if end is not None:
        return architecture.heads.get(end)
    classes = checkpoint.config.get("architectures")
    return by_name.get(classes[0]) if isinstance(classes, list) and classes else None


def _sources(checkpoint: Tensors, headed: HeadedClass, prefix: str) -> Mapping[str, str]:
    """Return the checkpoint's tensors that the class has, by its names for them."""
    body = f"{prefix}."
    prefixed = any(name.startswith(body) for name in checkpoint.names)
    own = checkpoint.config.get("architectures") == [headed.name]
    sources: dict[str, str] = {}
    for name in checkpoint.names:
        in_head = _within(name, headed.modules)
        other_head = not prefixed and not in_head and is_module(name, OUTPUT_EMBEDDINGS)
        new = name if prefixed or in_head or other_head else body + name
        pooler = _within(new, (f"{prefix}.pooler",))
        if own or _within(new, headed.modules) or (new.startswith(body) and not pooler):
            sources[new] = name
    return sources


def _saved(adapter: Adapter, name: str) -> bool:
    """Whether ``modules_to_save`` names the module of a tensor, or one that it lies in."""
    modules = name.split(".")[:-1]
    return any(adapter.config.saves(".".join(modules[:end])) for end in range(1, len(modules) + 1))


def _within(name: str, modules: tuple[str, ...]) -> bool:
    return name.startswith(tuple(f"{module}." for module in modules))


def _config(
    checkpoint: Tensors, adapter: Adapter, headed: HeadedClass, trained: Mapping[str, NDArray[Any]]
) -> Mapping[str, Any]:
    """Return the keys of ``config.json`` that say what the head is."""
    changed: dict[str, Any] = {"architectures": [headed.name]}
    told = adapter.head or HeadConfig()
    if told.pad_token_id is not None:
        changed["pad_token_id"] = told.pad_token_id
    outputs = _outputs(headed, trained)
    if not headed.classifies or outputs is None:
        return changed
    labels, problem = told.labels, told.problem_type
    if labels is not None and len(labels) != outputs:
        raise ShapeError(
            f"{headed.modules[-1]}: expected an output for each of the adapter's {len(labels)} labels, got "
            f"{outputs}; are labels and weights of one adapter?"
        )
    if labels is None:
        labels, problem = _base_labels(checkpoint.config), checkpoint.config.get("problem_type")
        if len(labels) != outputs:
            labels, problem = _numbered(outputs), None
    changed |= HeadConfig(labels=labels).to_json()
    changed["problem_type"] = problem
    if "num_labels" in checkpoint.config:
        changed["num_labels"] = outputs
    return changed


def _outputs(headed: HeadedClass, trained: Mapping[str, NDArray[Any]]) -> int | None:
    """Return how many outputs the trained head has; None where the adapter has not trained that part."""
    module = headed.modules[-1]
    for name in (f"{module}.weight", f"{module}.out_proj.weight"):
        if name in trained and trained[name].ndim == 2:
            return int(trained[name].shape[0])
    return None


def _base_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    labels = labels_of(config.get("id2label"))
    if labels is not None:
        return labels
    count = config.get("num_labels", _LABELS)
    return _numbered(count if isinstance(count, int) else _LABELS)


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{number}" for number in range(count))


def with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration with other values for some keys, and without those whose value is None."""
    return {
        key: value for key, value in {**config, **changes}.items() if key not in changes or value is not None
    }


def weights_dtype(checkpoint: Tensors) -> np.dtype[Any]:
    """Return the floating-point dtype that most of the checkpoint's entries have; float32 without any."""
    entries: dict[np.dtype[Any], int] = {}
    for name in checkpoint.names:
        dtype = checkpoint.dtype(name)
        if dtype in FLOATS:
            entries[dtype] = entries.get(dtype, 0) + int(np.prod(checkpoint.shape(name), dtype=np.int64))
    return max(entries, key=lambda dtype: entries[dtype], default=np.dtype(np.float32))
