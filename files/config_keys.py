"""What each key of PEFT's ``adapter_config.json`` means to an adapter.

Every key of PEFT 0.21's ``LoraConfig`` is a field of ``loracle.files.LoraConfig``, or in ``INERT``, or in
``NEUTRAL``. A test holds the three against PEFT's own list.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

INERT: frozenset[str] = frozenset(
    {
        # who wrote the file, for which model class, in which state
        "auto_mapping",
        "inference_mode",
        "peft_version",
        "revision",
        "runtime_config",
        # read only together with a key that is refused unless neutral
        "corda_config",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        # how A and B were first filled, without a change to W0
        "eva_config",
    }
)
"""Keys without effect on what a trained adapter computes; read and dropped."""

NEUTRAL: Mapping[str, Any] = MappingProxyType(
    {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "kasa_config": None,
        "layer_replication": None,
        "megatron_config": None,
        "monteclora_config": None,
        "use_bdlora": None,
        "use_qalora": False,
        "velora_config": None,
    }
)
"""Keys that change the mathematics and are not supported, with the one value that does not."""

BASE_PRESERVING: frozenset[str] = frozenset({"eva", "gaussian", "mica", "orthogonal"})
"""Names of ``init_lora_weights`` that fill A and B and leave W0 alone: nothing is seen of them afterwards."""

BASE_CHANGING: frozenset[str] = frozenset({"olora", "pissa"})
"""Names of ``init_lora_weights`` that take from W0 what they give to A and B, and can be trained from."""

BASE_CHANGING_UNSUPPORTED: frozenset[str] = frozenset({"corda", "loftq", "lora_ga"})
"""Names that change W0 by more than its own numbers (data, gradients, a quantisation)."""


def is_neutral(key: str, value: object) -> bool:
    """Tell whether ``value`` leaves the mathematics of ``key`` switched off.

    None, False and empty containers do for every key.
    """
    if key in NEUTRAL and value == NEUTRAL[key]:
        return True
    return value is None or value is False or (isinstance(value, (list, dict, str)) and len(value) == 0)
