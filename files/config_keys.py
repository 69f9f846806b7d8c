"""What each key of PEFT's ``adapter_config.json`` means to a merged weight.

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
"""Keys without effect on ``W0 + scaling * B @ A``; read and dropped."""

NEUTRAL: Mapping[str, Any] = MappingProxyType(
    {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "bias": "none",
        "ensure_weight_tying": False,
        "fan_in_fan_out": False,
        "kasa_config": None,
        "layer_replication": None,
        "lora_bias": False,
        "megatron_config": None,
        "modules_to_save": None,
        "monteclora_config": None,
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "velora_config": None,
    }
)
"""Keys that change the mathematics or add tensors, with the one value that does not."""

BASE_PRESERVING: frozenset[str] = frozenset({"eva", "gaussian", "mica", "orthogonal"})
"""Names that ``init_lora_weights`` may hold; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change W0."""


def is_neutral(key: str, value: object) -> bool:
    """Tell whether ``value`` leaves the mathematics of ``key`` switched off.

    None, False and empty containers do for every key; ``bias`` is off when it says ``"none"``.
    """
    if key in NEUTRAL and value == NEUTRAL[key]:
        return True
    return value is None or value is False or (isinstance(value, (list, dict, str)) and len(value) == 0)
