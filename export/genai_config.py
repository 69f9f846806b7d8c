"""The `genai_config.json` that lets onnxruntime-genai run an exported folder as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .names import ATTENTION_MASK, GRAPH_FILE, INPUT_IDS, LOGITS

FILE = "genai_config.json"


def genai_config(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """The description of an exported decoder, from its `config.json` and `generation_config.json`.

    `past_present_share_buffer` is true because the graph appends to the cache in place. Search is greedy:
    a deployment that wants sampling sets its own.
    """
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    context = int(config["max_position_embeddings"])

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
            "context_length": context,
            "vocab_size": int(config["vocab_size"]),
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": GRAPH_FILE,
                "head_size": int(config.get("head_dim") or hidden // heads),
                "hidden_size": hidden,
                "num_attention_heads": heads,
                "num_hidden_layers": int(config["num_hidden_layers"]),
                "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
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
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
