"""The adapter that an extraction comes to: its configuration, its tensors, and the bytes of its files."""

import json
from collections.abc import Mapping

import numpy as np

from loracle.files import Adapter, Checkpoint, LoraConfig, LoraPair
from loracle.files.adapter_ranks import alpha_for, with_ranks
from loracle.files.adapter_tensors import arrays_by_key
from loracle.files.architectures import CLASS_ENDS
from loracle.files.checkpoint import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, is_module
from loracle.files.safetensors_writer import safetensors_header
from loracle.files.ties import SHARED

from .kinds import module_of, names_for, stores_turned
from .others import Others

_EMBEDDINGS = (*INPUT_EMBEDDINGS, *OUTPUT_EMBEDDINGS, *SHARED)
_TASKS = {
    **{end: task for task, end in CLASS_ENDS.items()},
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def adapter_of(base: Checkpoint, pairs: Mapping[str, LoraPair], others: Others) -> Adapter:
    """Return the adapter with a pair for each of these weights, by the base's names, and whole tensors.

    Raises:
        TargetError, ShapeError, DTypeError, NonFiniteError: see `Adapter`.
    """
    own = {module_of(name): pair for name, pair in pairs.items()}
    modules = {module_of(name) for name in base.names if module_of(name)}
    config = LoraConfig(
        target_modules=names_for(own, modules - own.keys()),
        fan_in_fan_out=stores_turned(base.config),
        modules_to_save=others.modules_to_save,
        bias=others.bias,
        ensure_weight_tying=base.tied and any(is_module(name, _EMBEDDINGS) for name in others.tensors),
        base_model_name_or_path=str(base.dir),
        task_type=_task(base),
    )
    config = with_ranks(
        config,
        {path: pair.r for path, pair in own.items()},
        {path: pair.scaling for path, pair in own.items()},
    )
    return Adapter(config, own, others.tensors)


def files_bytes(base: Checkpoint, ranks: Mapping[str, int], others: Others, scaling: float) -> int:
    """Return the bytes of the files of an adapter of these ranks, its factors in float32."""
    zeros = {}
    for name, r in ranks.items():
        outputs, inputs = base.shape(name)[:: -1 if stores_turned(base.config) else 1]
        A, B = np.zeros((r, inputs), np.float32), np.zeros((outputs, r), np.float32)
        zeros[name] = LoraPair(A, B, alpha_for(scaling, r) / r)
    adapter = adapter_of(base, zeros, others)
    arrays = arrays_by_key(adapter.config, adapter.pairs, adapter.tensors, {})
    layout = [(name, array.dtype, array.shape) for name, array in arrays.items()]
    header = len(safetensors_header(layout, {"format": "pt"}))
    described = len(json.dumps(adapter.config.to_json(), indent=2)) + 1
    return header + described + sum(array.nbytes for array in arrays.values())


def _task(base: Checkpoint) -> str | None:
    """Return PEFT's name for what the base's class does."""
    named = base.config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)
