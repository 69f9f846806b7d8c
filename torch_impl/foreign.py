"""Adapters in the pickled files of loralib and LitGPT, loaded into a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from loracle.files import Adapter, adapter_from_litgpt, adapter_from_loralib
from loracle.reference import ConfigError

from .adapter_io import load_adapter
from .arrays import array_of
from .layer import DEFAULT
from .state_file import read_state_dict


def load_loralib(
    model: nn.Module,
    path: str | Path,
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    enable_lora: Mapping[str, Sequence[bool]] | None = None,
    embeddings: Sequence[str] = (),
    convolutions: Sequence[str] = (),
    adapter_name: str = DEFAULT,
) -> tuple[str, ...]:
    """Load what ``torch.save(loralib.lora_state_dict(model), path)`` wrote, and return the adapted paths.

    Each layer computes what loralib's does; how weights are stored the model says. A MergedLinear comes as
    one pair of r ranks for each slice together (`LoraFusedLinear.pair`): the same numbers, but if it is
    trained on, the zeros in its lora_B train, too.

    Args:
        model: with loralib's module paths; changed in place, untouched when an error is raised.
        path: the file; read without running any code in it.
        r, lora_alpha, lora_dropout, enable_lora, embeddings, convolutions: see
            `loracle.files.adapter_from_loralib`.
        adapter_name: what to call it.

    Raises:
        FileError: the file can't be read, or holds something else than a dict of tensors.
        LoracleError: as `loracle.files.adapter_from_loralib` and `load_adapter` do.
    """
    adapter = adapter_from_loralib(
        read_state_dict(Path(path)),
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        enable_lora=enable_lora,
        embeddings=embeddings,
        convolutions=convolutions,
    )
    return load_adapter(model, _with_untrained_biases(adapter, model), adapter_name)


def load_litgpt(
    model: nn.Module,
    path: str | Path,
    *,
    lora_r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
    adapter_name: str = DEFAULT,
) -> tuple[str, ...]:
    """Load LitGPT's ``lit_model.pth.lora`` into a Llama-like model, and return the adapted paths.

    Args:
        model: of transformers; its configuration says how many heads there are of which size.
        path: the file; read without running any code in it.
        lora_r, lora_alpha, lora_dropout, lora_query, lora_key, lora_value: as in ``hyperparameters.yaml``
            beside it.
        adapter_name: what to call it.

    Raises:
        FileError: the file can't be read, or holds something else than a dict of tensors.
        ConfigError: the model's configuration doesn't tell its heads.
        LoracleError: as `loracle.files.adapter_from_litgpt` and `load_adapter` do.
    """
    heads, groups, size = _heads(model)
    adapter = adapter_from_litgpt(
        read_state_dict(Path(path), inside="model"),
        lora_r=lora_r,
        lora_alpha=lora_alpha,
        n_head=heads,
        n_query_groups=groups,
        head_size=size,
        lora_dropout=lora_dropout,
        lora_query=lora_query,
        lora_key=lora_key,
        lora_value=lora_value,
    )
    return load_adapter(model, adapter, adapter_name)


def _with_untrained_biases(adapter: Adapter, model: nn.Module) -> Adapter:
    """Return the adapter with the model's own biases where ``bias="lora_only"`` leaves some out.

    loralib does for its Conv2d, whose bias is that of a layer inside it.
    """
    if adapter.config.bias != "lora_only":
        return adapter
    own = dict(model.named_parameters())
    missing = {f"{path}.bias" for path in adapter.pairs} & own.keys() - adapter.tensors.keys()
    biases = {name: array_of(own[name]).copy() for name in sorted(missing)}
    return Adapter(adapter.config, adapter.pairs, {**adapter.tensors, **biases})


def _heads(model: nn.Module) -> tuple[int, int, int]:
    """Return the numbers of query heads and of key and value heads, and their size."""
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None)
    if size is None and isinstance(heads, int) and heads > 0:
        size = getattr(config, "hidden_size", 0) // heads
    if not (isinstance(heads, int) and isinstance(groups, int) and isinstance(size, int) and size):
        raise ConfigError(
            f"model.config: expected num_attention_heads and hidden_size or head_dim of a Llama-like model, "
            f"got {type(model).__name__} without them; load into the transformers model"
        )
    return heads, groups, size
