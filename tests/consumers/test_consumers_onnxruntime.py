"""onnxruntime in Python, without loracle: baked, linked and swappable give loracle's greedy tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from consumer_fixtures import NEW_TOKENS, PROMPTS, ROOT, Exports, our_tokens, task_tokens

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "plain_onnxruntime.py"


def plain_tokens(graph: Path, *tensors: Path) -> list[list[int]]:
    found = []
    for prompt in PROMPTS[:2]:
        arguments = [str(graph), json.dumps(prompt), str(NEW_TOKENS), *map(str, tensors)]
        # Isolated: the script's imports are installed packages alone.
        command = [sys.executable, "-I", str(SCRIPT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    return found


def test_the_forms_differ_where_they_should(exports: Exports) -> None:
    """Equal tokens of a consumer would prove little where the tasks answer alike."""
    answers = {name: our_tokens(graph) for name, graph in exports.graphs().items()}
    german = task_tokens(exports.deployment, "german")
    assert answers["baked"] == answers["linked"] == answers["portable"]
    assert answers["base"] == answers["swappable"]
    assert german == our_tokens(exports.german / "model.onnx")
    for prompt, *others in zip(range(len(PROMPTS)), answers["baked"], answers["base"], german, strict=True):
        assert len({tuple(tokens) for tokens in others}) == 3, prompt
        assert min(len(set(tokens)) for tokens in others) > NEW_TOKENS / 4, prompt


@pytest.mark.parametrize("name", ["baked", "portable", "linked", "base"])
def test_a_graph_with_its_weights_gives_the_same_tokens(exports: Exports, name: str) -> None:
    graph = exports.graphs()[name]
    assert plain_tokens(graph) == our_tokens(graph, PROMPTS[:2])


def test_a_swappable_task_gives_the_same_tokens_by_its_tensors_as_inputs(exports: Exports) -> None:
    graph, tensors = exports.deployment / "swappable.onnx", exports.deployment / "german.task.safetensors"
    assert plain_tokens(graph, tensors) == task_tokens(exports.deployment, "german", PROMPTS[:2])
    assert plain_tokens(graph) == our_tokens(exports.deployment / "model.onnx", PROMPTS[:2])


def test_the_page_shows_the_script_that_is_run() -> None:
    assert f"```python\n{SCRIPT.read_text('utf-8')}```\n" in (ROOT / "docs/consumers.md").read_text("utf-8")
