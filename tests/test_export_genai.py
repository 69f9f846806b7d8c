"""onnxruntime-genai runs an exported folder as it is, and answers as our own session does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime_genai
from export_fixtures import make_model

from loracle.export import DecoderSession, export, greedy
from loracle.export.genai_config import genai_config
from loracle.export.template import DecoderShape

PROMPT = [5, 77, 30, 12]


def test_onnxruntime_genai_generates_the_same_tokens(tmp_path: Path) -> None:
    export(make_model(tmp_path / "base"), tmp_path / "onnx")
    ours = [token for token, _ in greedy(DecoderSession(tmp_path / "onnx", 16), PROMPT, 8)]
    model = onnxruntime_genai.Model(str(tmp_path / "onnx"))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + 8)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array([PROMPT], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    theirs = [int(token) for token in generator.get_sequence(0)][len(PROMPT) :]
    assert theirs == ours[: len(theirs)]
    assert len(theirs) == 8 or theirs[-1] == 257


def test_missing_keys_take_transformers_defaults() -> None:
    config = {"model_type": "llama", "eos_token_id": [7, 8]}
    shape = DecoderShape(
        layers=2, heads=4, kv_heads=3, head_size=16, hidden_size=64, vocabulary=97, context=128
    )
    model = genai_config(shape, config, {"bos_token_id": 3})["model"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (3, [7, 8], 7)
    assert (model["context_length"], model["vocab_size"]) == (128, 97)
    decoder = model["decoder"]
    assert (decoder["head_size"], decoder["hidden_size"]) == (16, 64)
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (4, 3)
    assert decoder["num_hidden_layers"] == 2
