"""The page of examples/browser in a real Chromium: typed into and clicked, it answers as loracle does."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from consumer_fixtures import (
    NEW_TOKENS,
    NODE_FOLDER,
    ROOT,
    TEXTS,
    Exports,
    chromium,
    node,
    our_tokens,
    run_json,
)

from loracle.export.encoder_answers import answer_texts
from loracle.export.text import TextModel

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "examples/browser"
PACKAGES = NODE_FOLDER / "node_modules"
SERVE = [str(EXAMPLE / "serve.py"), "--port", "0"]
# Any static server: no headers, so one thread.
PLAIN = ["-u", "-m", "http.server", "--bind", "127.0.0.1", "0", "--directory"]
VIEWS = ("desktop", "dark", "phone")
DECODERS = ("baked", "portable", "linked", "base", "swappable")


def example() -> ModuleType:
    """The program that assembles the page."""
    spec = importlib.util.spec_from_file_location("assemble", EXAMPLE / "assemble.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page with tiny models; one of them lacks a file."""
    assemble = example()
    root = tmp_path_factory.mktemp("site")
    assemble.write_page(root, PACKAGES)
    texts = {"about": "A tiny model.", "prompt": "Text", "action": "Go", "examples": ["one", "two"]}
    folder = root / "models/classifier"
    shutil.copytree(exports.classifier, folder)
    entry = {**texts, "id": "classifier", "title": "classifier", "task": "text-classification"}
    entries = [assemble.described(entry, folder)]
    for name, graph in exports.graphs().items():
        folder = root / "models" / graph.parent.name
        if not folder.exists():
            shutil.copytree(graph.parent, folder)
        entry = {**texts, "id": name, "title": name, "task": "text-generation", "max_new_tokens": NEW_TOKENS}
        entries.append(assemble.described(entry, folder, graph.stem))
    entries.append({**entries[0], "id": "broken", "title": "broken", "folder": "nowhere"})
    assemble.write_list(root, entries)
    return root


@contextmanager
def served(site: Path, program: Sequence[str]) -> Iterator[str]:
    """The page's address."""
    command = [sys.executable, *program, str(site)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            yield line[line.index("http://") :].split()[0].rstrip(")")
        finally:
            process.kill()


def seen(
    site: Path,
    pictures: Path,
    asks: Sequence[tuple[str, str]],
    *,
    views: Sequence[str],
    program: Sequence[str],
) -> dict[str, Any]:
    """What the page shows to each question, and what the browser says; nothing is asked of other servers."""
    with served(site, program) as url:
        request = {
            "url": url,
            "chromium": chromium(),
            "views": views,
            "asks": [{"model": model, "text": text} for model, text in asks],
            "pictures": str(pictures),
        }
        found: dict[str, Any] = run_json([node()], NODE_FOLDER / "browser.mjs", request)
    assert [asked for asked in found["requests"] if not asked.startswith(url)] == []
    return found


def check_scores(model: Path, text: str, shown: Any) -> None:
    """The labels in order, and the scores to the digits that are shown."""
    (ours,) = answer_texts(model, [text])
    assert [label for label, _ in shown] == [scored.label for scored in ours]
    for (_, percent), scored in zip(shown, ours, strict=True):
        # A tenth of a percent, and half of one where rounding goes the other way.
        assert abs(float(percent.removesuffix("%")) - 100 * scored.score) <= 0.1, (text, shown)


def check_writing(graph: Path, prompt: str, count: int, shown: dict[str, Any]) -> None:
    """The text of the greedy tokens, up to an end token, and their number."""
    text = TextModel(graph)
    (tokens,) = our_tokens(graph, [text.encode_prompt(prompt)], count)
    ended = [place for place, token in enumerate(tokens) if token in text.stop]
    tokens = tokens[: ended[0] + 1] if ended else tokens
    assert shown["written"] == text.decode(tokens)
    assert shown["status"].startswith(f"{len(tokens)} tokens in ")


def check_views(found: dict[str, Any], *, isolated: bool) -> None:
    assert found["console"] == []
    for view in found["views"].values():
        assert view["isolated"] is isolated
        assert view["accessibility"] == []
        assert not any(shown["wrong"] or shown["wide"] for shown in view["answers"])


@pytest.mark.parametrize(("program", "isolated"), [(SERVE, True), (PLAIN, False)], ids=["serve", "plain"])
def test_it_answers_with_every_form_of_graph(
    exports: Exports, site: Path, tmp_path: Path, program: list[str], isolated: bool
) -> None:
    """The ordinary graphs with onnxruntime's own operators, the portable one, and a linked task's."""
    asks = [*(("classifier", text) for text in TEXTS[:3]), *((name, "one") for name in DECODERS)]
    found = seen(site, tmp_path, asks, views=VIEWS if isolated else VIEWS[:1], program=program)
    check_views(found, isolated=isolated)
    for view in found["views"].values():
        for (name, text), shown in zip(asks, view["answers"], strict=True):
            if name == "classifier":
                check_scores(exports.classifier, text, shown["scores"])
                assert shown["written"] is None
            else:
                check_writing(exports.graphs()[name], text, NEW_TOKENS, shown)
                assert shown["scores"] is None


def test_a_model_that_cannot_be_loaded_is_said(exports: Exports, site: Path, tmp_path: Path) -> None:
    """And the next question is answered."""
    asks = [("classifier", TEXTS[0]), ("broken", "one"), ("classifier", TEXTS[1])]
    found = seen(site, tmp_path, asks, views=VIEWS[2:], program=SERVE)
    ((first, broken, last),) = (view["answers"] for view in found["views"].values())
    assert broken["wrong"]
    assert "nowhere" in broken["status"]
    assert not any(shown["wide"] for shown in (first, broken, last))
    for text, shown in ((TEXTS[0], first), (TEXTS[1], last)):
        check_scores(exports.classifier, text, shown["scores"])


@pytest.mark.model
def test_the_real_models_answer(tmp_path: Path, users_cache: Path) -> None:
    """As the README has it: assembled, served, asked."""
    site = tmp_path / "site"
    command = [sys.executable, str(EXAMPLE / "assemble.py"), str(site), "--packages", str(PACKAGES)]
    environment = {**os.environ, "LORACLE_CACHE": str(users_cache)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    asks = [("Classifier", "Pad an array."), ("Classifier", "Draw a filled contour plot.")]
    asks += [("Chat", "What is the capital of France?"), ("Chat", "Name three colors.")]
    found = seen(site, tmp_path, asks, views=VIEWS[:1], program=SERVE)
    check_views(found, isolated=True)
    (answers,) = (view["answers"] for view in found["views"].values())
    for (name, text), shown in zip(asks, answers, strict=True):
        if name == "Classifier":
            check_scores(site / "models/classifier", text, shown["scores"])
        else:
            check_writing(site / "models/chat/model.onnx", text, 64, shown)
    assert [shown["scores"][0][0] for shown in answers[:2]] == ["numpy", "matplotlib"]
    assert "Paris" in answers[2]["written"]
