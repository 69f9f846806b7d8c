"""Whether what an adapter holds is what its configuration says, by names, shapes and values."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.reference import DTypeError, ShapeError, TargetError

from .checkpoint import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS
from .config import LoraConfig
from .lora_pair import FLOATS, LoraPair, check_dtype, check_finite, check_pair
from .peft_keys import PREFIX, SUFFIXES, Wrappers, without_base_layers
from .safetensors_file import DTYPES

Tensors = Mapping[str, NDArray[Any]]

EMBEDDINGS = (*INPUT_EMBEDDINGS, *OUTPUT_EMBEDDINGS, "shared")
"""Last components of the modules whose weights PEFT copies into a file, trained or not."""

_OTHER = "config and weights are of different adapters"


def wrappers_of(config: LoraConfig, pairs: Mapping[str, LoraPair]) -> Wrappers:
    """Return where the pairs lie in a file."""
    return Wrappers.of(
        (path for path, pair in pairs.items() if pair.kind != "parameter"),
        (path for path, pair in pairs.items() if pair.kind == "parameter"),
        config.targets_parameter,
    )


def check_pairs(config: LoraConfig, pairs: Mapping[str, LoraPair], wrappers: Wrappers) -> None:
    """Check that every pair is targeted, and fits its module's rank and scaling; see `check_pair`.

    Raises:
        TargetError, ShapeError, DTypeError, NonFiniteError: the message names the tensor.
    """
    _check_stacks(config, pairs, wrappers)
    for path, pair in pairs.items():

        def key(part: str, path: str = path, pair: LoraPair = pair) -> str:
            prefixed = f"embedding_{part}" if pair.kind == "embedding" and part in ("A", "B") else part
            return wrappers.key(path, prefixed)

        unnamed = pair.kind == "parameter" and not config.targets_parameter(path)
        if not (_holds_parameter(config, path) if unnamed else _is_targeted(config, path, pairs)):
            raise TargetError(
                f"{key('A')}: {'parameter' if pair.kind == 'parameter' else 'module'} {path} is not targeted "
                f"by the adapter's config (target_modules {config.target_modules!r}"
                f"{_said(config)}); {_OTHER}"
            )
        # a pattern may give each parameter of the module a rank, and which one this is nobody has said
        rank = None if unnamed and config.rank_pattern else config.rank_of(path)
        check_pair(config, path, pair, rank, key)


def check_tensors(
    config: LoraConfig, tensors: Tensors, pairs: Mapping[str, LoraPair], tokens: Tensors, wrappers: Wrappers
) -> None:
    """Check that every whole tensor is one that the configuration trains, or an embedding.

    Raises:
        TargetError, DTypeError, NonFiniteError: the message names the tensor.
    """
    for name, array in tensors.items():
        key = wrappers.tensor_key(name, tokens)
        if not _belongs(config, name, pairs, tokens):
            raise TargetError(
                f"{key}: lies in no module of modules_to_save {config.modules_to_save!r}, is no bias that "
                f"bias {config.bias!r} trains, and no embedding's weight; {_OTHER}"
            )
        if array.dtype not in DTYPES.values():
            raise DTypeError(f"{key}: safetensors has no dtype {array.dtype}; convert the tensor")
        if array.dtype in FLOATS:
            check_finite(key, array)


def check_tokens(config: LoraConfig, tokens: Tensors, pairs: Mapping[str, LoraPair]) -> None:
    """Check that there are trained rows for the tokens of the configuration, and for no others.

    Raises:
        TargetError, ShapeError, DTypeError, NonFiniteError: the message names the tensor.
    """
    for path, rows in tokens.items():
        key = f"{PREFIX}{path}{SUFFIXES['tokens']}"
        indices = config.token_indices_of(path)
        if indices is None:
            raise TargetError(
                f"{key}: {path} is not among trainable_token_indices {config.trainable_token_indices!r}; "
                f"{_OTHER}"
            )
        if path in pairs:
            raise TargetError(f"{key}: {path} has a lora_A and lora_B too; train rows or an update, not both")
        check_dtype(key, rows)
        if rows.ndim != 2 or rows.shape[0] != len(indices) or 0 in rows.shape[1:]:
            raise ShapeError(
                f"{key}: expected shape ({len(indices)}, d), a row for each of trainable_token_indices, got "
                f"{rows.shape}; {_OTHER}"
            )
        check_finite(key, rows)
    _check_all_tokens(config, tokens)


def _check_all_tokens(config: LoraConfig, tokens: Tensors) -> None:
    """Check that no embedding's rows are missing; one tied to another with the same tokens has none."""
    wanted = config.trainable_token_indices
    if not wanted:
        return
    present = {config.token_indices_of(path) for path in tokens}
    named = wanted if isinstance(wanted, Mapping) else {"<input embedding>": wanted}
    for name, indices in named.items():
        if indices not in present:
            raise TargetError(
                f"{PREFIX}{name}{SUFFIXES['tokens']}: expected a row for each of trainable_token_indices, "
                f"got no such tensor; {_OTHER}"
            )


def _check_stacks(config: LoraConfig, pairs: Mapping[str, LoraPair], wrappers: Wrappers) -> None:
    for module, paths in wrappers.stacked.items():
        named = [config.targets_parameter(path) for path in paths]
        if module in pairs and pairs[module].kind != "parameter":
            raise TargetError(
                f"{module}: has an update of its own and of its parameter {paths[0]}; target one of them"
            )
        if any(named) and not all(named):
            raise TargetError(
                f"{module}: {', '.join(paths)} are parameters with and without their names; name all of them"
            )
        depths = sorted(without_base_layers(path)[1] for path in paths)
        if not any(named) and depths != list(range(len(paths))):
            raise TargetError(
                f"{wrappers.key(paths[0], 'A')}: expected a wrapper within each of {len(paths)} at {module}, "
                f"got base_layer {', '.join(map(str, depths))} times; was the copy complete?"
            )


def _is_targeted(config: LoraConfig, path: str, pairs: Mapping[str, LoraPair]) -> bool:
    if pairs[path].kind == "parameter":
        return config.targets_parameter(path)
    return module_targeted(config, path) or (config.ensure_weight_tying and _is_tied(path, config, pairs))


def module_targeted(config: LoraConfig, path: str) -> bool:
    """Tell whether the module at ``path`` is targeted, or the MultiheadAttention that it is out_proj of."""
    attention, _, name = path.rpartition(".")
    return config.targets(path) or (name == "out_proj" and config.targets(attention))


def _is_tied(path: str, config: LoraConfig, pairs: Mapping[str, LoraPair]) -> bool:
    """Whether the pair is a targeted embedding's, transposed, as an output layer tied to it has."""
    own = pairs[path]
    return own.kind == "linear" and any(
        pair.kind == "embedding"
        and config.targets(other)
        and np.array_equal(own.A, pair.B.T)
        and np.array_equal(own.B, pair.A.T)
        for other, pair in pairs.items()
    )


def _holds_parameter(config: LoraConfig, path: str) -> bool:
    """Whether a parameter of this module may be targeted, by the module's part of the names."""
    module = without_base_layers(path)[0]
    return any(holds_parameter(module, name) for name in config.target_parameters or ())


def holds_parameter(module: str, name: str) -> bool:
    """Tell whether ``name``, of ``target_parameters``, may be of a parameter of ``module``."""
    holder = name.rpartition(".")[0]
    return not holder or module == holder or module.endswith(f".{holder}")


def _said(config: LoraConfig) -> str:
    return "" if config.target_parameters is None else f", target_parameters {config.target_parameters!r}"


def _belongs(config: LoraConfig, name: str, pairs: Mapping[str, LoraPair], tokens: Tensors) -> bool:
    module, _, leaf = name.rpartition(".")
    if leaf == "bias" and (config.bias == "all" or (config.bias == "lora_only" and module in pairs)):
        return True
    components = module.split(".") if module else []
    if any(config.saves(".".join(components[:end])) for end in range(1, len(components) + 1)):
        return True
    if module in tokens or (module in pairs and pairs[module].kind == "embedding"):
        return leaf == "weight"
    return leaf in ("weight", "bias") and bool(components) and components[-1] in EMBEDDINGS
