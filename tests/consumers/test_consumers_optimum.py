"""Optimum loads exported folders as they are: equal greedy tokens, and a classifier's logits bit for bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from consumer_fixtures import (
    NEW_TOKENS,
    PROMPTS,
    TEXTS,
    Exports,
    our_tokens,
    peers_python,
    run_json,
)
from task_fixtures import word_tokenizer

from loracle.export import open_session
from loracle.export.text import TextModel

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "optimum_run.py"
QUESTIONS = ("What is the capital of France?", "Name three colors.")


def check(
    graph: Path, found: dict[str, list[list[int]]], prompts: Sequence[Sequence[int]], count: int
) -> None:
    """Alone and in a batch, each prompt is answered as loracle answers it, up to an end token."""
    (end,) = TextModel(graph).stop
    for place, ours in enumerate(our_tokens(graph, prompts, count)):
        expected = ours[: ours.index(end) + 1] if end in ours else ours
        assert found["alone"][place] == expected, (graph, place)
        # A row that has ended is filled up.
        assert found["batch"][place][: len(expected)] == expected, (graph, place)


def asked(graphs: Sequence[Path], prompts: Sequence[Sequence[int]], count: int) -> list[dict[str, Any]]:
    options = {"prompts": prompts, "count": count}
    return [
        {"folder": str(graph.parent), "file": graph.name, "binding": binding, **options}
        for graph in graphs
        for binding in (False, True)
    ]


def test_causal_models_give_the_same_tokens(exports: Exports) -> None:
    """Baked, linked and portable, with Optimum's own copies of the cache and with bound buffers."""
    graphs = [*exports.graphs().values()]
    requests = asked(graphs, PROMPTS, NEW_TOKENS)
    found = run_json([peers_python()], SCRIPT, {"decoders": requests})["decoders"]
    for request, answers in zip(requests, found, strict=True):
        check(Path(request["folder"]) / request["file"], answers, PROMPTS, NEW_TOKENS)


@pytest.mark.model
def test_the_real_model_and_its_linked_task_give_the_same_tokens(real: Path) -> None:
    text = TextModel(real)
    prompts = [text.encode_prompt(question) for question in QUESTIONS]
    requests = asked([real / "model.onnx", real / "french.onnx"], prompts, 24)[::2]
    found = run_json([peers_python()], SCRIPT, {"decoders": requests})["decoders"]
    for request, answers in zip(requests, found, strict=True):
        check(Path(request["folder"]) / request["file"], answers, prompts, 24)


def test_a_classifier_gives_the_same_labels_and_bits(exports: Exports) -> None:
    encoded = word_tokenizer()([*TEXTS], padding=True, return_token_type_ids=True)
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    request = {"classifier": {"folder": str(exports.classifier), "inputs": inputs, "threads": 1}}
    found = run_json([peers_python()], SCRIPT, request)["classifier"]
    assert found["onnxruntime"] == onnxruntime.__version__
    session = open_session(exports.classifier, threads=1)
    (logits,) = session.run(["logits"], {name: np.array(rows) for name, rows in inputs.items()})
    assert found["logits"] == logits.tobytes().hex()
    names = json.loads((exports.classifier / "config.json").read_text())["id2label"]
    assert found["labels"] == [names[str(place)] for place in logits.argmax(-1)]
    assert len(set(found["labels"])) > 1
