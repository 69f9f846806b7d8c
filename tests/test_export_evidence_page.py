"""The page says what was found, needs nothing beside it, is safe whatever files hold, and fits a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from certificate_fixtures import CONTROLS, MARKUP
from evidence_fixtures import bench, certificate, everything, with_text, write

from loracle.export.evidence.folder import read_results
from loracle.export.evidence.page import render, write_page

CONSUMERS = Path(__file__).parent / "consumers"
NODE_FOLDER = CONSUMERS / "node"
VOID = {"meta"}


class Page(HTMLParser):
    """Tags and text of a page; elements must be closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data


def source(tmp_path: Path, documents: dict[str, Any]) -> str:
    return render(read_results(write(tmp_path, documents)))


def test_the_page_says_claim_figure_and_verdict(tmp_path: Path) -> None:
    page = Page(source(tmp_path, everything()))
    for said in (
        "unlike adapters, no additional inference latency.”",
        "AdapterL 1.205 [1.190, 1.220]",
        "1 kB for a task in the place of 1 MB",
        "d90 = 10,000 of 1,000,000 parameters",
        "✓ agrees: This is the base model with the adapter merged",
        "bench/bench.json",
        "loracle bench --model gpt2-medium --settings 1x128",
    ):
        assert said in page.text
    assert "not measured here" not in page.text
    # A table beside every finding, with heads that say what they are of.
    assert page.tags.count("table") == page.tags.count("caption") >= page.tags.count("article")
    assert {value for name, value in page.attributes if name == "scope"} == {"row", "col"}
    assert ("role", "img") in page.attributes


def test_what_was_not_measured_says_how_to(tmp_path: Path) -> None:
    page = Page(source(tmp_path, {"c.json": certificate()}))
    assert page.text.count("not measured here. To measure it:") == 4
    assert "loracle intrinsic --model DIR --data FILE --out DIR" in page.text


def test_the_page_stands_alone(tmp_path: Path) -> None:
    text = source(tmp_path, everything())
    page = Page(text)
    assert set(page.tags).isdisjoint({"script", "link", "img", "iframe", "object", "form"})
    assert all(value.startswith("#claim-") for name, value in page.attributes if name == "href")
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert not re.search(r"url\(|@import|https?:", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("text", [MARKUP, "x" * 5000])
def test_names_that_mean_harm_stay_text(tmp_path: Path, text: str) -> None:
    plain = Page(source(tmp_path / "plain", everything()))
    documents = {name: with_text(own, text) for name, own in everything().items()}
    names = {f"{place}.json": own for place, own in enumerate(documents.values())}
    page = Page(source(tmp_path / "harm", names))
    assert set(page.tags) == set(plain.tags)
    assert {name for name, _ in page.attributes} == {name for name, _ in plain.attributes}
    assert text[:40] in page.text
    assert len(page.text) < 400_000


def test_control_characters_are_not_put_out(tmp_path: Path) -> None:
    text = source(tmp_path, {"a\u202e.json": with_text(certificate(), CONTROLS.replace("\udc80", ""))})
    assert not [
        letter for letter in CONTROLS if letter not in "\r\n" and letter in text and not letter.isprintable()
    ]
    assert "\\u202e" in text


@pytest.mark.parametrize("number", [1e15, 1e-15, 1])
def test_extreme_numbers_are_drawn(tmp_path: Path, number: float) -> None:
    """Also where all are the same: no axis has a length of 0."""

    def changed(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {
                key: own if key in ("version", "effort") else changed(own, key) for key, own in value.items()
            }
        if isinstance(value, list):
            return [changed(own, name) for own in value]
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        return number if isinstance(value, float) else max(1, round(number))

    text = source(tmp_path, {name: changed(own) for name, own in everything().items()})
    assert "svg" in Page(text).tags
    assert not re.search(r'"-?(nan|inf)', text)


def test_long_tables_are_cut(tmp_path: Path) -> None:
    document = bench()
    document["rows"] *= 100
    text = Page(source(tmp_path, {"bench.json": document})).text
    assert "And 200 more, in the file." in text


def test_it_is_written_whole(tmp_path: Path) -> None:
    results = read_results(write(tmp_path, {"c.json": certificate()}))
    write_page(tmp_path / "report.html", results)
    assert (tmp_path / "report.html").read_text("utf-8") == render(results)


@pytest.mark.slow
def test_in_a_browser(tmp_path: Path) -> None:
    node, browser = shutil.which("node"), shutil.which("chromium") or shutil.which("chromium-browser")
    if node is None or browser is None or not (NODE_FOLDER / "node_modules").is_dir():
        pytest.skip("make test-consumers installs Node.js and Chromium")
    documents = {
        **everything(),
        "harm.json": with_text(bench(), MARKUP),
        "long.json": with_text(bench(), "x" * 400),
    }
    write_page(tmp_path / "report.html", read_results(write(tmp_path, documents)))
    request = {"page": (tmp_path / "report.html").as_uri(), "chromium": browser, "pictures": str(tmp_path)}
    done = subprocess.run(
        [node, str(NODE_FOLDER / "page.mjs"), json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["console"] == []
    assert found["requests"] == [request["page"]]
    for view in ("desktop", "dark", "phone", "print"):
        assert not found["views"][view]["wide"], view
        assert found["views"][view]["accessibility"] == [], view
    light, dark = (found["views"][view]["background"] for view in ("desktop", "dark"))
    assert light == "rgb(253, 253, 252)"
    assert dark == "rgb(21, 23, 24)"
