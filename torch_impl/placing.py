"""Layers for what shares a weight with an adapted layer, and for embeddings with trained rows."""

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from loracle.reference import TargetError

from .layer import LoraLayer
from .read_weights import LoraModule
from .shared_weight import WeightFollower, WeightOwner
from .targets import Targets
from .tied import LoraTiedEmbedding, LoraTiedLinear, check_tied, tied_layer
from .token_rows import TiedTokenRows, TokenRows
from .update import UpdateOptions
from .whole_tensors import WholeTensor

Placed = dict[str, LoraLayer | LoraModule]
"""What is to stand in the place of a module, by its path."""


def check_tokens(
    targets: Targets,
    modules: Mapping[str, nn.Module],
    whole: Mapping[str, WholeTensor],
    placed: Mapping[str, LoraLayer | LoraModule],
) -> None:
    """Check that nothing else, of this adapter or of another, is where rows are trained, and the reverse.

    Raises:
        TargetError: a module has trained rows and an update, or is trained whole; or is merged.
    """
    rows = {*targets.tokens, *targets.tied_tokens}
    for path in (*targets.modules, *targets.tied, *(full.rpartition(".")[0] for full in targets.parameters)):
        if isinstance(placed.get(path), TokenRows):
            raise TargetError(
                f"{path}: expected a layer without trained rows, got one of another adapter's "
                "trainable_token_indices; eject() that adapter first"
            )
    for path in rows:
        there = placed.get(path)
        if there is None:
            continue
        if not isinstance(there, TokenRows) or isinstance(there, TiedTokenRows) is not (
            path in targets.tied_tokens
        ):
            raise TargetError(
                f"{path}: expected a layer that no other adapter has changed in another way, got "
                f"{type(there).__name__} for trainable_token_indices; eject() that adapter first"
            )
        if there.merged:
            raise TargetError(f"{path}: expected an unmerged layer, got a merged one; unmerge() first")
    for full, tensor in whole.items():
        for path in rows:
            if any(place.module is modules[path] and place.attribute == "weight" for place in tensor.places):
                raise TargetError(
                    f"{path}: expected trained rows or a weight trained whole, got trainable_token_indices "
                    f"and {full}; leave one of them out"
                )


def check_ties(targets: Targets, options_of: Callable[[str], UpdateOptions]) -> None:
    """Check that the configuration says the same of all modules that are to have one update.

    Raises:
        ConfigError: see `check_tied`.
    """
    for path, owner in targets.tied.items():
        check_tied(options_of(path), options_of(owner), path, owner)


def share_updates(
    targets: Targets, modules: Mapping[str, nn.Module], placed: Placed, name: str
) -> dict[str, LoraLayer]:
    """Return a layer for each tied module, which has the update that its owner has got under ``name``.

    Raises:
        TargetError: a tied module can't be adapted.
    """
    layers: dict[str, LoraLayer] = {}
    for path, owner_path in targets.tied.items():
        if path not in placed:
            placed[path] = tied_layer(modules[path], path)
        layer, owner = placed[path], placed[owner_path]
        assert isinstance(layer, LoraTiedLinear | LoraTiedEmbedding), layer
        _share(layer, name, owner)
        layers[path] = layer
    return layers


def place_rows(
    targets: Targets, modules: Mapping[str, nn.Module], placed: Placed, name: str
) -> dict[str, TokenRows]:
    """Return a layer with rows under ``name`` for each path that has them, and for those tied to it.

    Raises:
        TargetError: a module can't have them.
        ConfigError: see `TokenRows.add_rows`.
    """
    layers: dict[str, TokenRows] = {}
    for path, tokens in targets.tokens.items():
        if path not in placed:
            placed[path] = TokenRows(modules[path], path)
        layer = placed[path]
        assert isinstance(layer, TokenRows), layer
        layer.add_rows(name, tokens)
        layers[path] = layer
    for path, owner_path in targets.tied_tokens.items():
        if path not in placed:
            placed[path] = TiedTokenRows(modules[path], path)
        follower = placed[path]
        assert isinstance(follower, TiedTokenRows), follower
        _share(follower, name, layers[owner_path])
        layers[path] = follower
    return layers


def in_order(layers: Mapping[str, LoraLayer], modules: Iterable[str]) -> dict[str, LoraLayer]:
    """Return the layers in the model's order; those of parameters, whose paths are no module's, last."""
    order = {path: at for at, path in enumerate(modules)}
    return {path: layers[path] for path in sorted(layers, key=lambda path: order.get(path, len(order)))}


def _share(layer: WeightFollower, name: str, owner: object) -> None:
    assert isinstance(owner, WeightOwner), owner
    layer.share(name, owner)
