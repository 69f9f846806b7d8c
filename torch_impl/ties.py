"""Modules that hold one weight, and who of them has its update or its trained rows."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from loracle.files import LoraConfig
from loracle.reference import ConfigError, TargetError


def weight_holders(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """Return for each path whose module's ``weight`` is a parameter the paths of all that have it as one.

    The path itself is among them; they are in the model's order.
    """
    holders: dict[int, list[str]] = {}
    for path, module in modules.items():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(path)
    return {
        path: tuple(holders[id(weight)])
        for path, module in modules.items()
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter)
    }


def tied_targets(
    matched: Iterable[str], modules: Mapping[str, nn.Module], config: LoraConfig
) -> tuple[LoraConfig, list[str], dict[str, str]]:
    """Return the configuration, the paths of the layers that have updates, and who is tied to which of them.

    Of modules that hold one weight the first embedding has the update, whichever is matched; as in PEFT, the
    configuration then targets it too, and other embeddings, which have pairs of their own in a file.

    Args:
        matched: paths of the modules that the configuration targets.
        modules: the model's, by path.
        config: ``ensure_weight_tying`` says that the one update is meant to count in all.

    Raises:
        TargetError: a weight is shared, and ``ensure_weight_tying`` does not say so; or there is no embedding
            that could have its update, or it may not be targeted.
    """
    holders = weight_holders(modules)
    owners: dict[str, None] = {}
    tied: dict[str, str] = {}
    for path in matched:
        group = holders.get(path, ())
        if len(group) < 2 or path in tied or path in owners:
            owners.update({} if path in tied else {path: None})
            continue
        other = next(other for other in group if other != path)
        if not config.ensure_weight_tying:
            raise TargetError(
                f"{path}.weight: expected a weight of its own, got one tied to {other}; a merge would change "
                "both: leave it out of the targets, or set ensure_weight_tying for one update that counts in "
                "both"
            )
        embeddings = _embeddings(path, group, modules)
        owners[embeddings[0]] = None
        tied |= {other: embeddings[0] for other in group if other != embeddings[0]}
        for embedding in embeddings:
            config = _targeting(config, embedding, path)
    return config, [path for path in modules if path in owners], tied


def token_targets(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig, adapted: Iterable[str]
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the tokens whose rows train, by the path of their embedding, and who is tied to which of these.

    Of modules that hold one weight the first embedding that is named has the rows, and they count in all.

    Args:
        model: asked for its input embedding, where ``trainable_token_indices`` has no names.
        modules: the model's, by path.
        config: its ``trainable_token_indices`` are read.
        adapted: paths of the modules that have an update, or a parameter with one.

    Raises:
        TargetError: a name matches nothing, an update has the weight too, or two layers have one weight and
            different tokens.
        ConfigError: an embedding is named without tokens.
    """
    named = _named_tokens(model, modules, config)
    holders = weight_holders(modules)
    tokens: dict[str, tuple[int, ...]] = {}
    tied: dict[str, str] = {}
    updated = set(adapted)
    for path, own in named.items():
        if path in tied:
            continue
        if not own:
            raise ConfigError(
                f"trainable_token_indices: expected tokens for {path}, got none; name some, or leave it out"
            )
        group = holders.get(path, (path,))
        for other in group:
            if other in updated:
                raise TargetError(
                    f"{path}: expected trained rows or an update, got trainable_token_indices and a target "
                    f"at {other}; leave one of them out"
                )
            if named.get(other, own) != own:
                raise TargetError(
                    f"{other}: expected the tokens of {path}, whose weight it has, in "
                    f"trainable_token_indices, got {list(named[other])} beside {list(own)}; one row can't "
                    "be two: name the same"
                )
        owner = path
        if len(group) > 1:
            embeddings = _embeddings(path, group, modules)
            owner = next((other for other in embeddings if other in named), "")
            if not owner:
                raise TargetError(
                    f"{path}: expected a weight of its own, got that of {embeddings[0]}; name that in "
                    "trainable_token_indices, then its rows count in both"
                )
        tokens[owner] = own
        tied |= {other: owner for other in group if other != owner}
    return tokens, tied


def _embeddings(path: str, group: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Return those of the paths that are of embeddings, at least one.

    Raises:
        TargetError: there is none, or two paths are of one module.
    """
    if len({id(modules[other]) for other in group}) < len(group):
        raise TargetError(
            f"{path}: expected a module with one path, got one that occurs as {', '.join(group)}; give each "
            "place a module, with the weight tied"
        )
    found = [other for other in group if isinstance(modules[other], nn.Embedding)]
    if not found:
        raise TargetError(
            f"{path}.weight: expected an embedding among the modules that it is tied to, got "
            f"{', '.join(group)}; leave it out of the targets"
        )
    return found


def _targeting(config: LoraConfig, path: str, other: str) -> LoraConfig:
    """Return the configuration with ``path`` among its targets.

    Raises:
        TargetError: it excludes that path.
    """
    if config.targets(path):
        return config
    named = config.target_modules
    if isinstance(named, str):
        changed = replace(config, target_modules=f"(?:{named})|{re.escape(path)}")
    else:
        changed = replace(config, target_modules=(*(named or ()), path))
    if not changed.targets(path):
        raise TargetError(
            f"{path}: expected an embedding that may be adapted, got one that is excluded or saved whole, "
            f"while {other}, which is tied to it, is targeted; target both or none"
        )
    return changed


def _named_tokens(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig
) -> dict[str, tuple[int, ...]]:
    """Return the tokens for each path that ``trainable_token_indices`` speaks of, in the model's order."""
    wanted = config.trainable_token_indices
    if not wanted:
        return {}
    if isinstance(wanted, Mapping):
        for name in wanted:
            if not any(path.endswith(name) for path in modules):
                raise TargetError(
                    f"trainable_token_indices: expected ends of the paths of embeddings, got {name!r}, which "
                    "no module has; correct it or leave it out"
                )
        found = {path: config.token_indices_of(path) for path in modules if path}
        return {path: own for path, own in found.items() if own is not None}
    paths = _input_embeddings(model, modules)
    if not paths:
        raise TargetError(
            f"trainable_token_indices: expected a model with an input embedding, got {type(model).__name__} "
            "without one; name the embedding, as in {'embed_tokens': [0, 1]}"
        )
    return dict.fromkeys(paths, wanted)


def _input_embeddings(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the path of what transformers' getter returns, else those that end in embed_tokens, as PEFT."""
    getter = getattr(model, "get_input_embeddings", None)
    if not callable(getter):
        return [path for path in modules if path.endswith("embed_tokens")]
    try:
        module = getter()
    except NotImplementedError:  # as of transformers' models of audio
        return []
    own = getattr(module, "base_layer", module)
    return [path for path, other in modules.items() if other is own][:1]
