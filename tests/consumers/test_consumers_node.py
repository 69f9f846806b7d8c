"""transformers.js under Node.js loads exported folders as they are: equal tokens, texts and labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from consumer_fixtures import (
    NEW_TOKENS,
    NODE_FOLDER,
    PROMPTS,
    ROOT,
    TEXTS,
    Exports,
    node,
    our_tokens,
    run_json,
)

from loracle.export.encoder_answers import answer_texts
from loracle.export.text import TextModel

SCRIPT = NODE_FOLDER / "transformers.mjs"
QUESTIONS = ("What is the capital of France?", "Name three colors.")


def check(
    graph: Path, prompts: Sequence[Sequence[int]], chats: Sequence[str], count: int, found: Any
) -> None:
    """Prompts alone, in a batch padded on the left, and by the chat template; up to an end token."""
    text = TextModel(graph)
    (end,) = text.stop
    ours = our_tokens(graph, [*prompts, *map(text.encode_prompt, chats)], count)
    ours = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in ours]
    asked, told = ours[: len(prompts)], ours[len(prompts) :]
    assert found["alone"] == asked, graph
    assert [row[: len(own)] for row, own in zip(found["batch"], asked, strict=True)] == asked, graph
    assert found["written"] == [text.decode(tokens) for tokens in told], graph


def run_and_check(
    graphs: Sequence[Path], prompts: Sequence[Sequence[int]], chats: Sequence[str], count: int
) -> None:
    options = {"prompts": prompts, "chats": chats, "count": count}
    requests = [{"folder": str(graph.parent), "graph": graph.stem, **options} for graph in graphs]
    answers = run_json([node()], SCRIPT, {"generate": requests})["generated"]
    for graph, found in zip(graphs, answers, strict=True):
        check(graph, prompts, chats, count, found)


@pytest.mark.slow
def test_text_generation_gives_the_same_tokens_and_texts(exports: Exports) -> None:
    run_and_check([*exports.graphs().values()], PROMPTS, ["one", "and two"], NEW_TOKENS)


@pytest.mark.slow
@pytest.mark.model
def test_the_real_model_and_its_linked_task_give_the_same_texts(real: Path) -> None:
    text = TextModel(real)
    prompts = [text.encode_prompt(question) for question in QUESTIONS]
    run_and_check([real / "model.onnx", real / "french.onnx"], prompts, QUESTIONS, 24)
    base, task = (our_tokens(real / name, prompts, 8) for name in ("model.onnx", "french.onnx"))
    assert text.decode(base[0]) == "The capital of France is Paris."
    assert all(own != other for own, other in zip(base, task, strict=True))


@pytest.mark.slow
def test_text_classification_gives_the_same_labels(exports: Exports) -> None:
    request = {"classify": {"folder": str(exports.classifier), "texts": TEXTS}}
    found = run_json([node()], SCRIPT, request)["classified"]
    ours = answer_texts(exports.classifier, TEXTS)
    assert len({str(scored[0].label) for scored in ours}) > 1
    for theirs, scored in zip(found, ours, strict=True):
        assert [entry["label"] for entry in theirs] == [own.label for own in scored]
        # Logits on either side of the exact ones; a score moves by half of what a logit does, at most.
        expected = [own.score for own in scored]
        np.testing.assert_allclose(
            [entry["score"] for entry in theirs], expected, rtol=0, atol=exports.tolerance
        )


def test_the_packages_of_the_page_are_those_of_the_tests() -> None:
    """The page is tested with the tests' packages."""
    locks = [
        json.loads((folder / "package-lock.json").read_text())
        for folder in (ROOT / "examples/browser", NODE_FOLDER)
    ]
    page, tests = ({name: own["version"] for name, own in lock["packages"].items() if name} for lock in locks)
    assert page.items() <= tests.items()
    assert not [name for lock in locks for name, own in lock["packages"].items() if "resolved" in own]
