"""Which tensors of a checkpoint an adapter changes, and how; what cannot be merged is refused here."""

from collections.abc import Collection, Mapping
from typing import Any

from numpy.typing import NDArray

from loracle.reference import ConfigError, DTypeError, ShapeError, TargetError

from .adapter import Adapter
from .base_tensors import BaseTensors
from .experts import OwnUpdates, pairs_of_experts, place_of
from .lora_pair import FLOATS, LoraPair
from .ties import same_update, tied_tensors
from .updates import Bias, Convolution, Dora, Linear, Stacked, TokenRows, Update, same_bits

_OTHER = "is this adapter for another model?"
_IN_MEMORY = "merge it in memory, with loracle.torch_impl.merge"


def plan_replacements(
    base: BaseTensors, adapter: Adapter, new: Collection[str] = ()
) -> dict[str, NDArray[Any]]:
    """Return the whole tensors of the adapter that take the place of one of the base's, by the base's names.

    One with the bits of the base's own, as PEFT's copies of embeddings have, changes nothing and is left out.

    Args:
        base: the model that the adapter is merged into.
        adapter: with its whole tensors.
        new: the names of those that have no place in the base and are not meant here: of a head.

    Raises:
        TargetError, ShapeError, DTypeError: a tensor has no place, or its place is another tensor's too; the
            message names it.
    """
    changed: dict[str, NDArray[Any]] = {}
    weights = {weight_name(base, path, pair) for path, pair in adapter.pairs.items()}
    whole = _by_own_name(base, {name: array for name, array in adapter.tensors.items() if name not in new})
    for name, array in whole.items():
        tied = tied_tensors(base, name)
        if name not in base:
            if any(same_bits(array, whole.get(other, base.tensor(other))) for other in tied):
                continue  # another module's copy of the one stored tensor
            raise TargetError(f"{name}: the model has no such tensor, the adapter replaces it; {_OTHER}")
        own = base.tensor(name)
        unchanged = same_bits(array, own)
        base.release(name)
        if unchanged:
            continue
        if array.shape != own.shape:
            raise ShapeError(
                f"{name}: the model's shape is {own.shape}, the adapter's {array.shape}; resize the model's "
                f"vocabulary first, if that is what the adapter was trained with"
            )
        if name in weights:
            raise TargetError(
                f"{name}: the adapter was trained on other numbers than the model's, and brings them along; "
                f"{_OTHER}"
            )
        if tied and not adapter.config.ensure_weight_tying:
            raise TargetError(
                f"{name}: input and output embeddings of this model are one tensor, and the adapter replaces "
                f"one of them; train it with ensure_weight_tying"
            )
        if array.dtype != own.dtype and not (array.dtype in FLOATS and own.dtype in FLOATS):
            raise DTypeError(
                f"{name}: the model's dtype is {own.dtype}, the adapter's {array.dtype}; {_OTHER}"
            )
        changed[name] = array
    return changed


def plan_updates(base: BaseTensors, adapter: Adapter) -> dict[str, Update]:
    """Return what happens to each weight that has a pair or trained rows, and to each bias.

    Raises:
        TargetError: a pair finds no weight of its shape; the weight is tied to another one; or the files do
            not say how to merge it. The message names the tensor.
        ConfigError: a stacked parameter has no name yet.
        DTypeError: a weight is not a floating-point tensor, as in a quantised checkpoint.
    """
    updates: dict[str, Update] = {}
    for path, pair in adapter.pairs.items():
        if pair.kind == "parameter" and not adapter.config.targets_parameter(path):
            raise ConfigError(
                f"{path}: expected a stacked parameter's name, which an adapter's file does not hold; name "
                f"it with name_parameters"
            )
        name = weight_name(base, path, pair)
        if name not in base and (pair.kind == "parameter" or place_of(path, base.experts) is not None):
            _add_experts(updates, base, path, adapter)
            continue
        tied = tied_tensors(base, name)
        if tied:
            _check_tied(base, name, path, adapter)
        for own in tied or (name,):
            if not tied or own not in updates:
                _check_place(updates, base, own, path, pair)
                updates[own] = _update(base, own, path, adapter)
        if pair.bias is not None:
            updates[_bias_name(base, name, pair)] = Bias(pair)
    for path, rows in adapter.tokens.items():
        indices = adapter.config.token_indices_of(path)
        if indices:
            name = base.find(f"{path}.weight")
            updates[name] = _token_rows(base, name, indices, rows)
    return updates


def _check_place(
    updates: Mapping[str, Update], base: BaseTensors, name: str, path: str, pair: LoraPair
) -> None:
    """Check that a pair finds a weight, which is no other pair's."""
    if name in updates:
        raise TargetError(f"{name}: two pairs of the adapter are of it, {path} is one; {_OTHER}")
    _check_weight(base, name, f"a pair for shape {pair.shape}")


def _add_experts(updates: dict[str, Update], base: BaseTensors, path: str, adapter: Adapter) -> None:
    """Add what a pair does to experts, which the base has stacked where the adapter has not, or not where it
    has."""
    pair = adapter.pairs[path]
    place = place_of(path, base.experts)
    if place is None:
        found = list(pairs_of_experts(base, path, pair, adapter.config.rank_of(path)))
        for name, own in found or [(path, pair)]:
            _check_place(updates, base, name, path, own)
            updates[name] = Linear(own)
        return
    stacked = base.find(place.parameter)
    before = updates.get(stacked)
    beside = isinstance(before, OwnUpdates) and place.key not in before.updates
    _check_place(
        {} if beside else updates, base, stacked if stacked in base else f"{path}.weight", path, pair
    )
    if pair.bias is not None:
        _bias_name(base, f"{path}.weight", pair)
    shape, parts = base.shape(stacked), len(base.experts[stacked.rpartition(".")[2]])
    if place.expert >= shape[0] or (shape[1], shape[2]) != (pair.shape[0] * parts, pair.shape[1]):
        raise TargetError(
            f"{stacked}: the model's shape is {shape}, the adapter has {pair.shape} for {path}; {_OTHER}"
        )
    own_updates = before.updates if isinstance(before, OwnUpdates) else {}
    update = Linear(pair) if pair.magnitude is None else Dora(pair)
    updates[stacked] = OwnUpdates({**own_updates, place.key: update}, parts)


def weight_name(base: BaseTensors, path: str, pair: LoraPair) -> str:
    """Return the name of the tensor that a pair belongs to: the base's, where it has one."""
    if pair.kind == "parameter":
        return base.find(path)
    attention = base.find(f"{path}.in_proj_weight")  # of a MultiheadAttention
    return attention if attention in base else base.find(f"{path}.weight")


def _by_own_name(base: BaseTensors, tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return an adapter's tensors under the base's names for them."""
    found: dict[str, NDArray[Any]] = {}
    for name, array in tensors.items():
        own = base.find(name)
        if own in found:
            raise TargetError(f"{own}: two tensors of the adapter take its place, {name} is one; {_OTHER}")
        found[own] = array
    return found


def _update(base: BaseTensors, name: str, path: str, adapter: Adapter) -> Update:
    """Return how a pair changes its weight."""
    pair, shape = adapter.pairs[path], base.shape(name)
    if pair.kind == "parameter" and len(shape) == 3:
        return _stacked(shape, name, adapter.config.rank_of(path), pair)
    # PEFT's fan_in_fan_out is for the layers that store (in, out); beside them it may adapt others
    stored_turned = pair.kind == "linear" and adapter.config.fan_in_fan_out and shape == pair.shape[::-1]
    if stored_turned and shape == pair.shape and _has_straight(base, adapter):
        raise TargetError(
            f"{name}: stored (out, in) or (in, out), which its shape {shape} does not tell, and the adapter "
            f"has layers of both; {_IN_MEMORY}"
        )
    if shape != pair.shape and not stored_turned:
        raise TargetError(f"{name}: the model's shape is {shape}, the adapter's {pair.shape}; {_OTHER}")
    turned = stored_turned or pair.kind == "embedding"
    if pair.magnitude is None:
        return Convolution(pair) if pair.kind == "convolution" else Linear(pair, turned)
    if turned:
        raise TargetError(
            f"{name}: expected rows that each have a magnitude, got DoRA on a weight stored (in, out), which "
            f"takes all of its rows at once; {_IN_MEMORY}"
        )
    return Dora(pair)


def _has_straight(base: BaseTensors, adapter: Adapter) -> bool:
    """Whether the adapter has a linear layer whose weight can only be stored (out, in)."""
    names = {path: weight_name(base, path, pair) for path, pair in adapter.pairs.items()}
    return any(
        pair.kind == "linear"
        and pair.shape != pair.shape[::-1]
        and names[path] in base
        and base.shape(names[path]) == pair.shape
        for path, pair in adapter.pairs.items()
    )


def _stacked(shape: tuple[int, ...], name: str, rank: int, pair: LoraPair) -> Stacked:
    experts, *matrix = shape
    outputs, inputs = pair.shape
    if pair.r != experts * rank or sorted(matrix) != sorted(pair.shape):
        raise TargetError(
            f"{name}: the model's shape is {shape}, the adapter has {pair.r / rank:g} weights of "
            f"{pair.shape}; {_OTHER}"
        )
    if outputs == inputs:
        raise TargetError(
            f"{name}: stored (E, out, in) or (E, in, out), which its shape {shape} does not tell; "
            f"{_IN_MEMORY}"
        )
    return Stacked(pair, experts, turned=matrix == [inputs, outputs])


def _bias_name(base: BaseTensors, weight: str, pair: LoraPair) -> str:
    """Return the name of the bias that lora_B's is added to.

    PEFT gives a MultiheadAttention's in_proj one too, of zeros, and neither adds nor trains it.
    """
    name = f"{weight.removesuffix('weight')}bias"
    _check_weight(base, name, "a bias of lora_B, and the merged layer would need one")
    if base.shape(name) != pair.B.shape[:1]:
        raise TargetError(
            f"{name}: the model's shape is {base.shape(name)}, the adapter's {pair.B.shape[:1]}; {_OTHER}"
        )
    return name


def _token_rows(base: BaseTensors, name: str, indices: tuple[int, ...], rows: NDArray[Any]) -> TokenRows:
    """Return the rows of an embedding; one that is tied gets them for both, as PEFT has it."""
    _check_weight(base, name, f"rows of shape {rows.shape}")
    if base.tied and len(tied_tensors(base, name)) > 1:
        raise TargetError(
            f"{name}: input and output embeddings of this model are one tensor, and the checkpoint holds it "
            f"twice; save the model again with transformers, which writes it once"
        )
    shape = base.shape(name)
    if len(shape) != 2 or shape[1] != rows.shape[1] or max(indices) >= shape[0]:
        raise TargetError(
            f"{name}: the model's shape is {shape}, the adapter has rows of {rows.shape[1]} for tokens up to "
            f"{max(indices)}; {_OTHER}"
        )
    return TokenRows(indices, rows)


def _check_tied(base: BaseTensors, name: str, path: str, adapter: Adapter) -> None:
    """Check that a pair of embeddings that are one tensor is meant for all of them, and the only one."""
    if not adapter.config.ensure_weight_tying:
        raise TargetError(
            f"{name}: input and output embeddings of this model are one tensor, so merging into {path} would "
            f"change both; train the adapter without {path}, or with ensure_weight_tying"
        )
    for other, pair in adapter.pairs.items():
        own = weight_name(base, other, pair)
        if tied_tensors(base, own) and not same_update(pair, adapter.pairs[path]):
            raise TargetError(
                f"{other}: expected the update of {path}, whose weight it shares, got another; one tensor "
                f"cannot have two: train with ensure_weight_tying, or untie the model first"
            )


def _check_weight(base: BaseTensors, name: str, what: str) -> None:
    if name not in base:
        raise TargetError(f"{name}: the model has no such tensor, the adapter has {what}; {_OTHER}")
    if base.dtype(name) not in FLOATS:
        raise DTypeError(
            f"{name}: expected a floating-point weight to merge into, got {base.dtype(name)}; "
            f"use the checkpoint before quantisation"
        )
