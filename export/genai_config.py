"""The `genai_config.json` that lets onnxruntime-genai run an exported folder as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loracle.files import Checkpoint
from loracle.files.json_file import read_json_object

from .names import ATTENTION_MASK, GENERATION_FILE, GRAPH_FILE, INPUT_IDS, LOGITS
from .template import DecoderShape


def genai_config(
    shape: DecoderShape, config: Mapping[str, Any], generation: Mapping[str, Any], *, grows: bool = False
) -> dict[str, Any]:
    """The description of an exported decoder, from its sizes, `config.json` and `generation_config.json`.

    `past_present_share_buffer` is true where the graph appends to the cache in place, and false where the
    cache `grows`. Search is greedy: a deployment that wants sampling sets its own.
    """

    def token(name: str) -> Any:
        return generation.get(name, config.get(name))

    end = token("eos_token_id")
    pad = token("pad_token_id")
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    return {
        "model": {
            "type": config["model_type"],
            "bos_token_id": token("bos_token_id"),
            "eos_token_id": end,
            "pad_token_id": pad,
            "context_length": shape.context,
            "vocab_size": shape.vocabulary,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": GRAPH_FILE,
                "head_size": shape.head_size,
                "hidden_size": shape.hidden_size,
                "num_attention_heads": shape.heads,
                "num_hidden_layers": shape.layers,
                "num_key_value_heads": shape.kv_heads,
                "inputs": {
                    "input_ids": INPUT_IDS,
                    "attention_mask": ATTENTION_MASK,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": shape.context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": not grows,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def genai_bytes(checkpoint: Checkpoint, shape: DecoderShape, *, grows: bool) -> bytes:
    """The content of `genai_config.json` for a checkpoint's decoder."""
    path = checkpoint.dir / GENERATION_FILE
    generation = read_json_object(path) if path.is_file() else {}
    described = genai_config(shape, checkpoint.config, generation, grows=grows)
    return (json.dumps(described, indent=2) + "\n").encode()
