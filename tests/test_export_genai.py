"""onnxruntime-genai runs an exported folder as it is, and answers as our own session does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai
import pytest
from export_fixtures import make_adapter, make_model

from loracle.export import DecoderSession, export, greedy
from loracle.export.genai_config import genai_config
from loracle.export.template import DecoderShape

PROMPT = [5, 77, 30, 12]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a task baked, and a deployment in which it is linked and another swappable."""
    root = tmp_path_factory.mktemp("genai")
    base = make_model(root / "base")
    french, german = make_adapter(root / "french", base), make_adapter(root / "german", base, seed=2)
    export(base, root / "baked", french)
    export(base, root / "deployment", french, form="linked", name="french")
    export(base, root / "deployment", german, form="swappable", name="german")
    return root


def our_tokens(graph: Path, prompt: Sequence[int]) -> list[int]:
    return [token for token, _ in greedy(DecoderSession(graph, len(prompt) + 8), prompt, 8)]


def their_tokens(config: onnxruntime_genai.Config, prompt: Sequence[int]) -> list[int]:
    model = onnxruntime_genai.Model(config)
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 8)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def check(config: onnxruntime_genai.Config, graph: Path) -> None:
    """The same tokens, as many unless they end."""
    theirs, ours = their_tokens(config, PROMPT), our_tokens(graph, PROMPT)
    assert theirs == ours[: len(theirs)]
    assert len(theirs) == 8 or theirs[-1] == 257


@pytest.mark.parametrize("folder", ["baked", "deployment"])
def test_a_folder_gives_the_same_tokens_as_it_is(models: Path, folder: str) -> None:
    check(onnxruntime_genai.Config(str(models / folder)), models / folder / "model.onnx")


@pytest.mark.parametrize(
    ("filename", "graph"), [("french.onnx", "french.onnx"), ("swappable.onnx", "model.onnx")]
)
def test_an_overlay_of_the_filename_chooses_a_graph_of_the_folder(
    models: Path, filename: str, graph: str
) -> None:
    """A linked task by its graph; that of swappable tasks is the base, for genai binds no more inputs."""
    folder = models / "deployment"
    config = onnxruntime_genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"filename": filename}}}))
    check(config, folder / graph)
    answers = [our_tokens(folder / name, PROMPT) for name in ("french.onnx", "model.onnx")]
    assert answers[0] != answers[1]


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
