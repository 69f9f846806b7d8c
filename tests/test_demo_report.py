"""The page and the table say what was measured, escape what they are given, and need nothing from outside."""

import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from loracle.demo import figures
from loracle.demo.charts import loss_chart, ratio_chart, scatter_chart
from loracle.demo.console import deployment_table, task_table
from loracle.demo.report import DemoReport, TaskReport, first_examples, render
from loracle.demo.scores import Comparison
from loracle.demo.settings import TRANSLATE
from loracle.demo.speed import DecodeSpeed
from loracle.export.svg import axis
from loracle.export.verification.report import Check

HOSTILE = '<script>alert("1")</script>&{{7*7}}[bold]'
VOID = {"meta", "circle", "line", "polyline"}

TASK = TaskReport(
    task=TRANSLATE,
    origin="catalogs",
    train_rows=1491,
    heldout_rows=3,
    quality=Comparison(13.34, 48.55, 30.2, 40.3, 0.0001, 10_000, 0),
    before=(10.0, 20.0, 30.0),
    after=(40.0, 15.0, 60.0),
    losses=(3.0, 2.0, 1.0),
    training_seconds=121.3,
    trainable_parameters=460_800,
    total_parameters=134_975_808,
    adapter_bytes=1_849_872,
    model_bytes=538_090_408,
    task_bytes=53_088_256,
    switch_seconds=0.000521,
    checks=(Check("graph", True, "1,021 nodes"), Check("initializers", True, "272 tensors")),
    speeds={
        "base": DecodeSpeed(52.31, 1.0, 1.0, 1.0),
        "merged": DecodeSpeed(52.44, 1.002, 0.991, 1.012),
        "unmerged": DecodeSpeed(44.1, 0.843, 0.83, 0.852),
    },
    examples=first_examples(["Save"], (["Salve"], [12.3]), (["Enregistrer"], [100.0]), ["Enregistrer"]),
)
REPORT = DemoReport("SmolLM2", 612.0, (TASK,), (("Processor", "two cores"),), (("numpy", "2.4.6"),))
FAILED = replace(
    TASK, checks=(TASK.checks[0], Check("initializers", False, "271 of 272", ("layer 3 differs",)))
)


class Page(HTMLParser):
    """The text, the tags and the balance of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(source)
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def test_the_page_says_what_was_measured() -> None:
    page = Page(render(REPORT))
    assert page.open == []
    for figure in (
        "13.3 → 48.5",
        "+35.2 [30.2, 40.3], p < 0.001",
        "460,800",
        "0.34% of 134,975,808, in 2 min 01 s",
        "53.1 MB 9.87% of the base’s 538 MB; the adapter has 1.85 MB. A switch takes 0.52 ms",
        "verified 2 of 2 checks passed",
        "1,491 training and 3 held-out texts",
        "base 52.3, merged 52.4, unmerged 44.1.",
        "graph 1,021 nodes ✓ passed",
        "ratio to the base model: merged 1.002 [0.991, 1.012]; unmerged 0.843 [0.830, 0.852]",
        "Save Salvechr F 12.3 Enregistrerchr F 100.0".replace("chr F", "chrF"),
        "10,000 bootstrap resamples",
        "The whole run took 10 min 12 s.",
        "Processortwo coresnumpy2.4.6",
        "every number was checked",
    ):
        assert figure in page.text


def test_a_failed_check_is_not_hidden() -> None:
    text = Page(render(replace(REPORT, tasks=(TASK, FAILED)))).text
    assert "not verified 1 of 2 checks passed" in text
    assert "271 of 272layer 3 differs ✗ failed" in text
    assert "Not every check of the export passed." in text
    assert "every number was checked" not in text
    assert not replace(TASK, checks=()).verified


def test_the_page_stands_alone() -> None:
    source = render(REPORT)
    page = Page(source)
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert {name for name, _ in page.attributes}.isdisjoint({"src", "href", "onload", "onclick"})
    assert not re.search(r"url\(|@import|https?:", source)


def test_everything_given_is_escaped() -> None:
    examples = first_examples([HOSTILE], ([HOSTILE], [0.0]), ([HOSTILE], [0.0]), [HOSTILE])
    speeds = {"base": TASK.speeds["base"], HOSTILE: TASK.speeds["merged"]}
    checks = (Check(HOSTILE, False, HOSTILE, (HOSTILE,)),)
    task = replace(TASK, origin=HOSTILE, examples=examples, speeds=speeds, checks=checks)
    page = Page(render(DemoReport(HOSTILE, 1.0, (task,), ((HOSTILE, HOSTILE),), ())))
    assert page.tags == Page(render(REPORT)).tags
    assert page.text.count(HOSTILE) >= 12


def test_examples_are_the_first_eight_in_order() -> None:
    names = [f"s{number}" for number in range(10)]
    scores = [float(number) for number in range(10)]
    examples = first_examples(names, (names, scores), (names[::-1], scores[::-1]), names)
    assert [(e.source, e.base, e.base_score, e.tuned, e.tuned_score, e.reference) for e in examples] == [
        (f"s{i}", f"s{i}", float(i), f"s{9 - i}", 9.0 - i, f"s{i}") for i in range(8)
    ]
    with pytest.raises(ValueError, match="shorter"):
        first_examples(names, (names, scores[:9]), (names, scores), names)


def printed(report: TaskReport) -> str:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(task_table(report))
    console.file.close()
    return re.sub(r"[ │┃]+", " ", console.export_text())


def test_the_table_says_the_same() -> None:
    text = printed(FAILED)
    for row in (
        "chrF on 3 held-out texts 13.3 48.5 +35.2 [30.2, 40.3], p < 0.001",
        "parameters, trained 134,515,008 460,800 0.34%, 2 min 01 s",
        "bytes, adapter 538 MB 1.85 MB 0.34%",
        "tokens a second, merged 52.3 52.4 ratio 1.002 [0.991, 1.012]",
        "tokens a second, unmerged 52.3 44.1 ratio 0.843 [0.830, 0.852]",
        "graph passed 1,021 nodes",
        "initializers FAILED 271 of 272; layer 3 differs",
    ):
        assert row in text
    assert HOSTILE in printed(replace(TASK, checks=(Check(HOSTILE, True, ""),)))


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (figures.size(0), "0 B"),
        (figures.size(999), "999 B"),
        (figures.size(1000), "1.00 kB"),
        (figures.size(9_994), "9.99 kB"),
        (figures.size(9_995), "10.0 kB"),
        (figures.size(99_949), "99.9 kB"),
        (figures.size(99_951), "100 kB"),
        (figures.size(999_499), "999 kB"),
        (figures.size(999_500), "1.00 MB"),
        (figures.size(538_090_408), "538 MB"),
        (figures.size(1_500_000_000), "1.50 GB"),
        (figures.size(2 * 10**15), "2,000 TB"),
        (figures.count(134_515_008), "134,515,008"),
        (figures.share(1, 3), "33.33%"),
        (figures.score(12.345), "12.3"),
        (figures.change(48.5, 13.3), "−35.2"),
        (figures.interval(-0.5, 0.25, 2), "[−0.50, 0.25]"),
        (figures.p_value(0.00099), "p < 0.001"),
        (figures.p_value(0.0499), "p = 0.050"),
        (figures.p_value(0.001), "p = 0.001"),
        (figures.p_value(0.0995), "p = 0.10"),
        (figures.p_value(1.0), "p = 1.00"),
        (figures.duration(0.4), "0 s"),
        (figures.duration(59.6), "1 min 00 s"),
        (figures.duration(125.0), "2 min 05 s"),
    ],
)
def test_figures(shown: str, expected: str) -> None:
    assert shown == expected


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 9))
def test_an_axis_holds_its_range_between_few_round_ticks(low: float, width: float, most: int) -> None:
    high = low + width
    found = axis(low, high, 0, 100, most)
    assert (
        found.low <= low <= high <= found.high
        or math.isclose(found.low, low)
        or math.isclose(found.high, high)
    )
    assert 2 <= len(found.ticks) <= most + 1
    assert (found(found.low), found(found.high)) == (0, 100)
    assert found.ticks[0] == found.low
    assert found.ticks[-1] == found.high


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, (0, 20, 40, 60, 80, 100)),
        (0.83, 1.012, (0.8, 0.85, 0.9, 0.95, 1.0, 1.05)),
        (0, 3.4, (0, 1, 2, 3, 4)),
        (5, 5, (4.5, 5, 5.5)),
    ],
)
def test_ticks(low: float, high: float, ticks: tuple[float, ...]) -> None:
    assert axis(low, high, 0, 1).ticks == ticks


def test_charts_put_marks_where_the_numbers_are() -> None:
    scatter = scatter_chart([0, 100, 50], [100, 50, 75], "chrF")
    assert 'cx="40.0" cy="12.0"' in scatter
    assert 'cx="228.0" cy="106.0"' in scatter
    assert "2 of 3 improved" in scatter
    loss = loss_chart([4.0, 2.0, 0.0])
    assert 'points="129.3,106.0 218.7,106.0 308.0,106.0"' in loss
    assert loss.count('class="mark faint"') == 3
    ratio = ratio_chart([("merged", 0.8, 0.9, 1.0)])
    assert '<line class="line" x1="84.0" y1="34" x2="308.0" y2="34"/>' in ratio
    assert '<circle class="mark" cx="196.0" cy="34" r="4"/>' in ratio


def test_the_terminal_says_what_each_task_costs_in_the_deployment() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    second = replace(
        TASK, task=replace(TASK.task, name="summarize"), task_bytes=26_544_128, switch_seconds=0.0004
    )
    console.print(deployment_table(replace(REPORT, tasks=(TASK, second))))
    rows = [" ".join(line.split()) for line in console.export_text().splitlines()]
    for row in (
        "base model 538 MB",
        "translate + 53.1 MB 9.87% 0.52 ms",
        "summarize + 26.5 MB 4.93% 0.4 ms",
    ):
        assert row in rows
