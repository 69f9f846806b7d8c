"""Adapters trained with LitGPT on Llama-like models, from the arrays of ``lit_model.pth.lora``.

Source: LitGPT, ``litgpt/lora.py`` (``LoRAQKVLinear``) and ``scripts/convert_lit_checkpoint.py``
(``copy_weights_llama``), at commit 26857050 of June 2026.
"""

import re
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from loracle.reference import ConfigError, FileError, ShapeError, TargetError, fused_adapters

from .adapter import Adapter
from .config import LoraConfig
from .config_checks import check_rank

Array = NDArray[Any]

_LAYER = re.compile(r"transformer\.h\.(?P<layer>\d+)\.(?P<module>.+)")
_PLACES: Mapping[str, str] = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
"""LitGPT's modules of a layer and those of Hugging Face's Llama."""

_QKV = "attn.qkv"
_NAMES = ("q_proj", "k_proj", "v_proj")


def adapter_from_litgpt(
    state: Mapping[str, Any],
    *,
    lora_r: int,
    lora_alpha: float,
    n_head: int,
    n_query_groups: int,
    head_size: int,
    lora_dropout: float = 0.0,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
) -> Adapter:
    """Return the adapter in LitGPT's state dict under the names of Hugging Face's Llama.

    The fused projection ``attn.qkv`` becomes a pair for each enabled part: A's rows of that part, and its
    rows of B, ``head_size * n_head`` for queries and ``head_size * n_query_groups`` for keys and values.

    Args:
        state: name to array; or the file's ``{"model": ...}`` around it.
        lora_r, lora_alpha, lora_dropout, lora_query, lora_key, lora_value: as in ``hyperparameters.yaml``.
            The other layers (``lora_projection``, ``lora_mlp``, ``lora_head``) are those that are there.
        n_head, n_query_groups, head_size: as in ``model_config.yaml``.

    Raises:
        FileError: a tensor is not understood (among them a mixture's experts, the fused layers of other
            architectures and of LitGPT before 0.5, ``attn.attn``), or one of a pair is missing.
        ConfigError: an argument is wrong.
        TargetError, ShapeError, DTypeError, NonFiniteError: as for `Adapter`.
    """
    sizes = {"n_head": n_head, "n_query_groups": n_query_groups, "head_size": head_size}
    for name, value in {"lora_r": lora_r, **sizes}.items():
        check_rank(name, value)
    if n_head % n_query_groups:
        raise ConfigError(
            f"n_query_groups: expected a divisor of n_head {n_head}, got {n_query_groups}; correct it"
        )
    enabled = (lora_query, lora_key, lora_value)
    widths = [head_size * heads for heads in (n_head, n_query_groups, n_query_groups)]
    inner = state.get("model")
    factors = _split(inner if isinstance(inner, Mapping) and len(state) == 1 else state)
    arrays: dict[str, tuple[Array, Array]] = {}
    for path, (A, B) in factors.items():
        layer = _LAYER.fullmatch(path)
        if path == "lm_head":
            arrays[path] = (A, B)
        elif layer is not None and layer["module"] in _PLACES:
            arrays[f"model.layers.{layer['layer']}.{_PLACES[layer['module']]}"] = (A, B)
        elif layer is not None and layer["module"] == _QKV:
            attention = f"model.layers.{layer['layer']}.self_attn"
            names = [name for name, on in zip(_NAMES, enabled, strict=True) if on]
            try:
                slices = fused_adapters(A, B, 1.0, widths, enabled)
            except ShapeError as error:
                raise ShapeError(f"{path}: {error}") from None
            arrays |= {f"{attention}.{name}": (own.A, own.B) for name, own in zip(names, slices, strict=True)}
        else:
            raise FileError(
                f"tensor {path}.lora_A is not understood, expected transformer.h.<layer> with {_QKV}, "
                f"{', '.join(_PLACES)}, or lm_head; only Llama-like models are supported"
            )
    config = LoraConfig(
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=tuple({path.rpartition(".")[2] for path in arrays}),
    )
    return Adapter.from_arrays(config, arrays)


def _split(state: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
    parts: dict[str, dict[str, Array]] = {}
    for name, array in sorted(state.items()):
        path, _, part = name.rpartition(".lora_")
        if not path or part not in ("A", "B"):
            raise FileError(
                f"tensor {name} is not understood, expected <module>.lora_A and <module>.lora_B; "
                f"give the file lit_model.pth.lora, not a merged model"
            )
        parts.setdefault(path, {})[part] = array
    if not parts:
        raise TargetError("the state dict has no lora_A and lora_B; was it saved before it was trained?")
    for path, own in parts.items():
        for part in ("A", "B"):
            if part not in own:
                raise FileError(f"{path}.lora_{part} is missing; was the copy complete?")
    return {path: (own["A"], own["B"]) for path, own in parts.items()}
