"""The names of files, inputs and outputs of an exported decoder: Optimum's, which onnxruntime-genai and
transformers.js accept as well. There is no `position_ids`: the attention operator counts positions from
`attention_mask` (padding on the right), and an input that changed nothing would mislead."""

from __future__ import annotations

from pathlib import Path

GRAPH_SUFFIX = ".onnx"
GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx_data"
SWAPPABLE_FILE = "swappable.onnx"
TASK_SUFFIX = ".task.safetensors"
ADAPTER_SUFFIX = ".onnx_adapter"
TASK_KEY = "loracle.task"
"""Where a task's graph, or its file of tensors, say what it was made of."""
GENAI_FILE = "genai_config.json"
GENERATION_FILE = "generation_config.json"
OPTIONS_KEY = "loracle.options"
"""Where a graph's metadata say how it was made."""

SHARDS_KEY = "loracle.shards"
"""Where a graph's metadata say which shards of a checkpoint it refers to, and what they are told by."""

ENCODER_FILE = "encoder_model.onnx"
DECODER_FILE = "decoder_model.onnx"
DECODER_WITH_PAST_FILE = "decoder_with_past_model.onnx"

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
TOKEN_TYPE_IDS = "token_type_ids"
PIXEL_VALUES = "pixel_values"
LOGITS_TO_KEEP = "num_logits_to_keep"
PAST_LENGTH = "past_length"
LOGITS = "logits"
ENCODER_MASK = "encoder_attention_mask"
ENCODER_STATES = "encoder_hidden_states"
LAST_HIDDEN_STATE = "last_hidden_state"

BATCH = "batch_size"
SEQUENCE = "sequence_length"
TOTAL_SEQUENCE = "total_sequence_length"
PAST_SEQUENCE = "past_sequence_length"
PRESENT_SEQUENCE = "present_sequence_length"
ENCODER_SEQUENCE = "encoder_sequence_length"


def model_folder(model: str | Path) -> Path:
    """The folder of an exported model: `model` itself, or where it is one of its graphs the graph's."""
    path = Path(model)
    return path.parent if path.suffix == GRAPH_SUFFIX else path


PAST = "past_key_values."


def past_names(layers: int) -> list[str]:
    """`past_key_values.N.key`, `past_key_values.N.value` for N in 0..layers-1, in graph order."""
    return [f"past_key_values.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def present_names(layers: int) -> list[str]:
    """`present.N.key`, `present.N.value` for N in 0..layers-1, in graph order."""
    return [f"present.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def cross_names(prefix: str, layers: int) -> list[tuple[str, str]]:
    """(`decoder` or `encoder`, `PREFIX.N.decoder.key`), and so on, for N in 0..layers-1, in graph order."""
    return [
        (side, f"{prefix}.{layer}.{side}.{kind}")
        for layer in range(layers)
        for side in ("decoder", "encoder")
        for kind in ("key", "value")
    ]
