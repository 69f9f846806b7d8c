"""The page says what the certificate says, needs nothing beside it, and is safe whatever names hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from certificate_fixtures import CONTROLS, LORA, MARKUP, harmful, report, weight

from loracle.export.verification import certificate_charts as charts
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
    page = _page(report(RIGHT, checks=[Check("answers", False, "12 of them", tuple("abcde"))]))
    assert re.search(r"12 of them a ?b ?c 2 more d ?e", page.words)


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("Größe 日本 ✓", "Größe 日本 ✓"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb\r\t", "a\\nb\\r\\t"),
        ("\u202egnp", "\\u202egnp"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
        ("\x00", "\\x00"),
    ],
)
def test_what_is_not_printed_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def _bars(page: str) -> list[tuple[str, float]]:
    return [
        (kind, float(height))
        for kind, height in re.findall(r'<rect class="(\w+)"[^>]*height="([0-9.]+)"', page)
    ]


def test_the_histogram_has_a_bar_for_each_bucket() -> None:
    ulps = ((0, 100_000), (1, 10), (2, 1), (8, 1000))
    chart = str(charts.ulp_chart(ulps))
    bars = _bars(chart)
    assert [kind for kind, _ in bars] == ["right", "off", "off", "off"]
    heights = [height for _, height in bars]
    assert heights[0] == max(heights)
    assert heights[0] > heights[3] > heights[1] > heights[2] > 0
    assert heights[0] - heights[3] == pytest.approx(heights[3] - heights[1], abs=0.2)
    titles = re.findall(r"<title>([^<]*)</title>", chart)
    assert titles[0] == (
        "Distance from the correctly rounded merge: 100,000 entries at 0 ulp; 10 entries at 1 ulp; "
        "1 entry at 2 ulp; 1,000 entries at 5 to 8 ulp"
    )
    assert titles[1:] == [
        *(
            "100,000 entries at 0 ulp",
            "10 entries at 1 ulp",
            "1 entry at 2 ulp",
            "1,000 entries at 5 to 8 ulp",
        )
    ]
    labels = re.findall(r">([^<>]+)</text>", chart)
    assert labels == ["0", "100k", "1", "10", "2", "1", "4", "8", "1,000"]


@pytest.mark.parametrize(
    ("most", "labels"),
    [
        (4, ["0", "1", "2", "4"]),
        (2**20, ["0", "4", "2⁵", "2⁸", "2¹¹", "2¹⁴", "2¹⁷", "2²⁰"]),
        (2**63, ["0", "2⁷", "2¹⁵", "2²³", "2³¹", "2³⁹", "2⁴⁷", "2⁵⁵", "2⁶³"]),
    ],
)
def test_a_wide_histogram_is_labelled_where_there_is_room(most: int, labels: list[str]) -> None:
    chart = str(charts.ulp_chart(((0, 5), (most, 5))))
    found = re.findall(r">([^<>]+)</text>", chart)
    assert [label for label in found if label != "5"] == labels
    assert max(float(x) for x in re.findall(r'<text class="label" x="([0-9.]+)"', chart)) < 320


@pytest.mark.parametrize(
    ("number", "short"), [(9_999, "9,999"), (10_000, "10k"), (1_234_567, "1.23M"), (25 * 10**9, "25G")]
)
def test_large_counts_are_short(number: int, short: str) -> None:
    assert f">{short}<" in str(charts.ulp_chart(((1, number),)))


def test_shares_add_up_and_few_are_seen() -> None:
    chart = str(charts.share_bar((("bad", 1), ("good", 9_999))))
    rectangles = re.findall(r'class="(\w+)" x="([0-9.]+)" y="0" width="([0-9.]+)"', chart)
    assert rectangles == [("bad", "0.00", "1.00"), ("good", "0.03", "319.97")]
    assert "<title>1 bad, 9999 good</title>" in chart


@pytest.mark.parametrize(
    ("error", "tolerance", "kind", "bar", "mark"),
    [
        (1.0, 4.0, "right", "78.0", "312.0"),
        (4.0, 1.0, "off", "312.0", "78.0"),
        (2.0, 2.0, "right", "312.0", "312.0"),
        (0.0, 0.0, "right", "1.0", "0.0"),
    ],
)
def test_an_error_beside_its_bound(error: float, tolerance: float, kind: str, bar: str, mark: str) -> None:
    chart = str(charts.bound_bar(error, tolerance))
    assert f'<rect class="{kind}" x="0" y="6" width="{bar}"' in chart
    assert f'<line class="mark" x1="{mark}"' in chart


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
