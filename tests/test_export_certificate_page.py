"""The page says what the certificate says, needs nothing beside it, and is safe whatever names hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from certificate_fixtures import CONTROLS, LORA, MARKUP, harmful, report, weight

from loracle.export.verification.advice import ADVICE
from loracle.export.verification.certificate import Certificate, certificate_of
from loracle.export.verification.certificate_page import render, write_page
from loracle.export.verification.graph_summary import GraphSummary
from loracle.export.verification.printable import printable
from loracle.export.verification.quality import Quality
from loracle.export.verification.report import Check, VerifyReport
from loracle.export.verification.verdict import Verdict, WeightVerdict, Witness

VOID = {"meta", "br", "link", "img", "input"}
INLINE = {"b", "code", "span"}
MINUS = "−"


class Page(HTMLParser):
    """Tags and text of a page; elements must be closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.classes: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.classes.append(dict(attrs).get("class") or "")
        if tag not in VOID:
            self._open.append(tag)
        if tag not in INLINE:
            self.text += " "

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.classes.append(dict(attrs).get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        if "title" in self._open and "svg" in self._open:
            self.titles.append(data)
        self.text += data

    @property
    def words(self) -> str:
        """The text with single spaces."""
        return " ".join(self.text.split())


def _page(found: VerifyReport) -> Page:
    return Page(
        render(
            certificate_of(
                found, {"exact": False, "outputs": True, "rows": 0, "data": None, "base_onnx": "b"}
            )
        )
    )


RIGHT, ROUNDED = (
    weight(Verdict.EXACT, "right.weight"),
    weight(Verdict.WITHIN_ULPS, "rounded.weight", unequal=3),
)
MISSING = weight(Verdict.MISSING, "missing.weight", passed=False, unequal=100)


def test_a_right_candidate() -> None:
    page = _page(report(RIGHT, RIGHT))
    assert "This is the base model with the adapter merged: all 2 weights are correctly rounded" in page.words
    assert "pass" in page.classes
    assert "fail" not in page.classes
    assert page.classes.count("card bad") == page.classes.count("card soft") == 0
    for said in ("candidate", "base", "adapter", "r = 4, alpha = 8, scaling 2.0", "2 correctly rounded"):
        assert said in page.words
    assert "✗" not in page.text


def test_a_wrong_candidate_names_its_worst_weights_and_what_to_do() -> None:
    page = _page(report(RIGHT, ROUNDED, MISSING))
    assert "fail" in page.classes
    assert "✗ failed" in page.text
    assert page.classes.count("card bad") == 1
    assert page.classes.count("card soft") == 1
    assert page.words.index("missing.weight delta missing") < page.words.index("rounded.weight within k ulp")
    assert ADVICE[Verdict.MISSING].remedy in page.words
    assert ADVICE[Verdict.WITHIN_ULPS].remedy.replace("`", "") not in page.words
    assert "[1, 2]" in page.text
    assert "100 of 100 entries are not the correctly rounded merge." in page.words


def test_counts_are_in_the_order_of_their_weight_and_in_its_colour() -> None:
    failing = weight(Verdict.WITHIN_ULPS, passed=False, unequal=1)
    source = render(certificate_of(report(RIGHT, RIGHT, ROUNDED, weight(Verdict.UNTOUCHED), MISSING)))
    counts = re.findall(r'<dt class="(\w+)">(\d+)</dt>\s*<dd><b>([^<]*)</b>', source)
    assert counts == [
        *(("bad", "1", "delta missing"), ("mild", "1", "within k ulp")),
        *(("good", "2", "correctly rounded"), ("good", "1", "untouched")),
    ]
    assert re.findall(r'<rect class="(\w+)" x="[^"]*" y="0" width="([^"]*)"', source) == [
        *(("bad", "64.00"), ("soft", "64.00"), ("good", "192.00"))
    ]
    cells = re.findall(r'<td class="(|mild|bad strong)">([\w ]+)</td>', source)
    assert cells == [
        *[("", "correctly rounded")] * 2,
        *(("mild", "within k ulp"), ("", "untouched"), ("bad strong", "delta missing")),
    ]
    # A verdict that passes of one weight and not of another is one that fails.
    source = render(certificate_of(report(ROUNDED, failing)))
    assert re.findall(r'<dt class="(\w+)">(\d+)</dt>', source) == [("bad", "2")]


def test_the_worst_are_twenty_and_the_table_has_all() -> None:
    weights = [weight(Verdict.TWICE, f"layer{i}.weight", passed=False, unequal=i + 1) for i in range(25)]
    page = _page(report(*weights, RIGHT))
    assert page.classes.count("card bad") == 20
    assert "And 5 more, in the table." in page.words
    assert "All 26 weights" in page.words
    cards, table = page.words.split("All 26 weights")
    assert "layer24.weight delta twice" in cards
    assert "layer4.weight delta twice" not in cards
    assert all(f"layer{i}.weight" in table for i in range(25))


def test_failures_are_all_there_the_first_at_once() -> None:
    page = _page(report(RIGHT, checks=[Check("answers", False, "12 of them", tuple("abcdefg"))]))
    assert re.search(r"12 of them a b c d e 2 more f g", page.words)


def test_a_check_that_was_not_asked() -> None:
    page = _page(report(RIGHT, checks=[Check("answers", True, "no memory", asked=False)]))
    assert "answers no memory not asked" in page.words


GRAPHS: dict[str, tuple[GraphSummary, tuple[str, ...]]] = {
    "equal": (
        GraphSummary(12, "the base's"),
        ("nodes 12", "compared with the base's", "none: equal node for node", "adapter left none"),
    ),
    "different": (
        GraphSummary(1200, "the base's", ("node 3 Add: added",), {"Add": 1, "Mul": 2}, {"Sub": 4}),
        ("nodes 1,200", "differences node 3 Add: added", "added 1 Add, 2 Mul", "missing 4 Sub"),
    ),
    "alone": (
        GraphSummary(
            3, strangers=("a product",), misplaced=("a weight",), found={"by name": 5, "by content": 6}
        ),
        (
            "no other graph",
            "other weights a product",
            "exchanged weights a weight",
            "5 by name, 6 by content",
        ),
    ),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_the_graph(kind: str) -> None:
    graph, said = GRAPHS[kind]
    page = _page(report(RIGHT, graph=graph))
    assert all(words in page.words for words in said)
    assert ("differences" in page.words) == (kind != "alone")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"error": 0.5, "tolerance": 2.0},
            "The largest error of an output is 0.5, 0.25 of the bound of 2 around the unmerged model",
        ),
        ({"error": 2.0, "tolerance": 2.0}, "is 2, 1 of the bound of 2 around"),
        ({"error": 3.0, "tolerance": 2.0}, "is 3, 1.5 times the bound of 2 around"),
        ({"error": 10.49, "tolerance": 1.0}, "is 10.5, 10 times the bound of 1 around"),
        ({"error": 9.94, "tolerance": 1.0}, "is 9.94, 9.9 times the bound of 1 around"),
        ({"error": 3.0, "tolerance": 1e-6}, "is 3, 3,000,000 times the bound of 1e-06 around"),
        ({"error": 0.0, "tolerance": 0.0}, "The largest error of an output is 0, the bound of 0 around"),
        ({"error": float("nan"), "tolerance": 2.0}, "An output is no finite number."),
        ({"quality": Quality(3, 0.5, 0.75, 0.1, 0.9)}, "KL divergence 0.1 nats"),
    ],
)
def test_the_answers(changes: dict[str, object], said: str) -> None:
    assert said in _page(report(RIGHT, **changes)).words


def test_without_answers_graph_and_adapter_there_are_no_such_parts() -> None:
    found = report(RIGHT, lora=None, adapter=None)
    page = _page(replace(found, inputs=found.inputs[::2]))
    assert "Answers" not in page.words
    assert "Graph" not in page.words
    assert "Adapter none" in page.words


def test_files_versions_options_and_clauses_are_listed() -> None:
    found = report(RIGHT)
    page = _page(found)
    for own in found.inputs:
        assert own.sha256 in page.text
        assert own.files[0].sha256 in page.text
        assert own.path in page.text
    for said in (
        "exact no",
        "outputs yes",
        "rows 0",
        "base onnx b",
        "2 Merge is correctly rounded.",
        "loracle 0.",
    ):
        assert said in page.words
    assert "data None" not in page.words
    assert "Options" not in Page(render(certificate_of(found, {"data": None}))).words


@pytest.mark.parametrize("text", [MARKUP, CONTROLS], ids=["markup", "controls"])
def test_names_are_text_and_nothing_else(text: str) -> None:
    clean = Page(render(harmful("zzz")))
    page = Page(render(harmful(text)))
    assert page.tags == clean.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in clean.attributes]
    tail = printable(text).rpartition("/")[2]  # an input is called by the last part of its path
    assert page.text.count(tail) == clean.text.count("zzz") > 100
    assert not set(page.text) & (set(CONTROLS[1:]) - {"\n", *"gnp.exe[2J"})


@pytest.mark.parametrize("certificate", [harmful("zzz"), harmful(MARKUP)], ids=["plain", "markup"])
def test_the_page_needs_nothing_and_runs_nothing(certificate: Certificate) -> None:
    source = render(certificate)
    page = Page(source)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert not [
        name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "srcset")
    ]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    style = source.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style


def test_it_is_written_whole_in_the_place_of_another(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("old")
    certificate = harmful(CONTROLS)
    write_page(tmp_path / "page.html", certificate)
    assert (tmp_path / "page.html").read_text("utf-8") == render(certificate)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def _with(change: Callable[[WeightVerdict], WeightVerdict]) -> Page:
    return _page(report(change(MISSING)))


def test_numbers_are_shown_as_they_are_read_back() -> None:
    page = _with(lambda own: replace(own, witness=Witness((), -1e-05, float("inf"))))
    assert f"expected {MINUS}1e{MINUS}05" in page.words
    assert "got inf" in page.words


@pytest.mark.parametrize(
    ("most", "said"), [(0, "0"), (4, "4"), (2**19, "524,288"), (2**20, "2^20"), (2**63, "2^63")]
)
def test_the_table_says_how_far_off_an_entry_is(most: int, said: str) -> None:
    page = _with(lambda own: replace(own, ulps=((0, 1), *(((most, 99),) if most else ()))))
    assert page.words.partition("All 1 weights")[2].partition("Files")[0].endswith(f" {said} ")


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (13_480_000_000, "13.5 GB"),
        (5 * 10**12, "5 TB"),
    ],
)
def test_sizes_have_three_digits(size: int, shown: str) -> None:
    found = report(RIGHT)
    one = replace(found.inputs[2], files=(replace(found.inputs[2].files[0], size=size),))
    assert f"checkpoint, 1 files, {shown} SHA-256" in _page(replace(found, inputs=(one,))).words


def test_doras_and_rsloras_adapters_are_said_to_be_such() -> None:
    lora = replace(LORA, r=(4, 8), scaling=(2.0, 4.0), use_rslora=True, use_dora=True)
    words = _page(report(RIGHT, lora=lora)).words
    assert "r = 4, 8, alpha = 8, scaling 2.0, 4.0, rsLoRA, DoRA" in words
