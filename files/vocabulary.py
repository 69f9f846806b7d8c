"""Embeddings that an adapter brings whole and that change the model's shape: of another number of tokens than
the base's, or an output layer trained apart from the input embedding that it was tied to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from loracle.reference import DTypeError, ShapeError, TargetError

from .adapter import Adapter
from .base_tensors import BaseTensors
from .checkpoint import OUTPUT_EMBEDDINGS, is_module
from .lora_pair import FLOATS
from .ties import EMBEDDINGS, SHARED, tied_tensors
from .updates import same_bits

_KEY = "vocab_size"
# Tensors beside the embeddings that have an entry for each token.
_PER_TOKEN = (
    "lm_head.bias",
    "lm_head.decoder.bias",
    "embed_out.bias",
    "predictions.bias",
    "predictions.decoder.weight",
    "predictions.decoder.bias",
    "final_logits_bias",
)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What an adapter makes of a model's vocabulary.

    Attributes:
        tensors: the base's names of embeddings to what takes their place, with another number of rows.
        new: output layers that the base has not, because it has them tied.
        config: the keys of ``config.json`` that this changes.
    """

    tensors: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    new: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def plan_vocabulary(base: BaseTensors, config: Mapping[str, Any], adapter: Adapter) -> Vocabulary:
    """Return the resized and untied embeddings of an adapter; nothing where it has none.

    Args:
        base: the model that the adapter is merged into; in it embeddings that the adapter has trained apart
            are no longer tied.
        config: the content of its ``config.json``.
        adapter: with its whole tensors.

    Raises:
        ShapeError: not all that has a row for each token is resized, or to different sizes; the message names
            the tensor.
        TargetError: two tensors that are one in the model differ, or one of two is trained without the other.
        DTypeError: an embedding is not a floating-point tensor.
    """
    new = _trained_apart(base, adapter)
    untied = {"tie_word_embeddings": False} if new else {}
    if new:
        base.tied = False
    old = config.get(_KEY)
    found: dict[str, NDArray[Any]] = {}
    copies: dict[str, NDArray[Any]] = {}
    for name, array in adapter.tensors.items():
        own = base.find(name)
        ties = tied_tensors(base, own)
        held = own if own in base else next(iter(ties), None)
        if held is None or not is_module(own, EMBEDDINGS) or not _is_resized(base.shape(held), array, old):
            continue
        if array.dtype not in FLOATS:
            raise DTypeError(
                f"{name}: expected a floating-point embedding, got {array.dtype}; train the adapter again"
            )
        if len(ties) > 0 and adapter.config.saves(name.rpartition(".")[0]):
            _check_trained_as_one(adapter, name)
        (found if own in base else copies)[own] = array
    if not found and not copies:
        for name, array in new.items():
            _check_rows(name, len(array), "config.json", old)
        return Vocabulary(new=new, config=untied)
    for own, array in copies.items():
        for stored in tied_tensors(base, own):
            if not same_bits(found.setdefault(stored, array), array):
                raise TargetError(
                    f"{own}: expected the values of {stored}, which is the same tensor in this model, got "
                    "others; train the adapter with ensure_weight_tying"
                )
    first, *_ = found
    size = len(found[first])
    for name, array in {**found, **new}.items():
        _check_rows(name, len(array), first, size)
    _check_whole(base, found, first, old)
    return Vocabulary(found, new, {_KEY: size, **untied})


def _trained_apart(base: BaseTensors, adapter: Adapter) -> dict[str, NDArray[Any]]:
    """Return the output layer that an adapter trains as a tensor of its own while the base has it tied.

    Not T5's, which scales what goes into an output layer that is tied.
    """
    if not base.tied or adapter.config.ensure_weight_tying or any(is_module(n, SHARED) for n in base.names):
        return {}
    return {
        name: array
        for name, array in adapter.tensors.items()
        if is_module(name, OUTPUT_EMBEDDINGS)
        and base.find(name) not in base
        and array.dtype in FLOATS
        and array.ndim == 2
        and adapter.config.saves(name.rpartition(".")[0])
    }


def _is_resized(shape: tuple[int, ...], array: NDArray[Any], old: object) -> bool:
    return (
        len(shape) == array.ndim == 2
        and shape[0] == old
        and shape[1] == array.shape[1]
        and shape[0] != len(array)
    )


def _check_trained_as_one(adapter: Adapter, name: str) -> None:
    if not adapter.config.ensure_weight_tying:
        raise TargetError(
            f"{name}: input and output embeddings of this model are one tensor, and the adapter replaces "
            f"one of them; train it with ensure_weight_tying"
        )


def _check_rows(name: str, rows: int, first: str, size: object) -> None:
    if rows != size:
        raise ShapeError(
            f"{name}: expected {size} rows, as {first} has, got {rows}; save the adapter with both "
            "embeddings resized alike"
        )


def _check_whole(base: BaseTensors, found: Mapping[str, NDArray[Any]], first: str, old: object) -> None:
    """Check that whatever has a row for each token is resized."""
    for name in base.names:
        shape = base.shape(name)
        per_token = is_module(name, EMBEDDINGS) or name.endswith(_PER_TOKEN)
        if name not in found and per_token and old in shape:
            raise ShapeError(
                f"{name}: the model's shape is {shape}, and the adapter's {first} has {len(found[first])} "
                "tokens; it should bring this tensor too: resize the model's vocabulary first, or save the "
                "adapter with its embedding layers"
            )
