"""The charts of a certificate's page show the numbers that they are given."""

from __future__ import annotations

import re

import pytest

from loracle.export.verification import certificate_charts as charts


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


HISTOGRAM = (
    '<svg viewBox="0 0 320 112" width="320" height="112" role="img">'
    "<title>Distance from the correctly rounded merge: 100 entries at 0 ulp; 1 entry at 3 to 4 ulp</title>"
    '<line class="axis" x1="4" y1="92" x2="316" y2="92"/>'
    '<text class="label" x="30.0" y="106.0" text-anchor="middle">0</text>'
    '<rect class="right" x="8.7" y="16.0" width="42.6" height="76.0">'
    "<title>100 entries at 0 ulp</title></rect>"
    '<text class="label" x="30.0" y="12.0" text-anchor="middle">100</text>'
    '<text class="label" x="82.0" y="106.0" text-anchor="middle">1</text>'
    '<text class="label" x="134.0" y="106.0" text-anchor="middle">2</text>'
    '<text class="label" x="186.0" y="106.0" text-anchor="middle">4</text>'
    '<rect class="off" x="164.7" y="66.7" width="42.6" height="25.3">'
    "<title>1 entry at 3 to 4 ulp</title></rect>"
    '<text class="label" x="186.0" y="62.7" text-anchor="middle">1</text></svg>'
)
SHARES = (
    '<svg viewBox="0 0 320 8" width="320" height="8" role="img" preserveAspectRatio="none">'
    "<title>1 bad, 1 soft, 2 good</title>"
    '<rect class="bad" x="0.00" y="0" width="80.00" height="8"/>'
    '<rect class="soft" x="80.00" y="0" width="80.00" height="8"/>'
    '<rect class="good" x="160.00" y="0" width="160.00" height="8"/></svg>'
)
BOUND = (
    '<svg viewBox="0 0 320 20" width="320" height="20" role="img" preserveAspectRatio="none">'
    "<title>error 1, tolerance 4</title>"
    '<rect class="ground" x="0" y="6" width="320" height="8" rx="1"/>'
    '<rect class="right" x="0" y="6" width="78.0" height="8" rx="1"/>'
    '<line class="mark" x1="312.0" y1="0" x2="312.0" y2="20"/></svg>'
)


def test_the_pictures() -> None:
    """Looked at: bars stand on the axis, inside the frame, with their labels below and above."""
    assert charts.ulp_chart(((0, 100), (4, 1))) == HISTOGRAM
    assert charts.share_bar((("bad", 1), ("soft", 1), ("good", 2))) == SHARES
    assert charts.bound_bar(1.0, 4.0) == BOUND


@pytest.mark.parametrize("most", [0, 1, 2, 4, 8, 64, 128, 256, 2**31, 2**63])
def test_bars_stand_inside_the_frame(most: int) -> None:
    chart = str(charts.ulp_chart(((most, 1), (0, 10**12))) if most else charts.ulp_chart(((0, 1),)))
    for x, y, width, height in re.findall(
        r'<rect class="\w+" x="([0-9.-]+)" y="([0-9.-]+)" width="([0-9.-]+)" height="([0-9.-]+)"', chart
    ):
        assert 4 <= float(x) <= float(x) + float(width) <= 316
        assert float(y) >= 15.9
        assert float(y) + float(height) == pytest.approx(92, abs=0.11)
        assert float(height) >= 2


@pytest.mark.parametrize(
    ("most", "words"),
    [(1, "1"), (2, "2"), (4, "3 to 4"), (8, "5 to 8"), (16, "9 to 16"), (2048, "1,025 to 2,048")],
)
def test_a_bar_says_what_it_counts(most: int, words: str) -> None:
    assert f"<title>3 entries at {words} ulp</title></rect>" in charts.ulp_chart(((most, 3),))


def test_few_bars_have_their_numbers_above_them() -> None:
    assert ">77<" in charts.ulp_chart(((0, 5), (128, 77)))
    assert ">77<" not in charts.ulp_chart(((0, 5), (256, 77)))


@pytest.mark.parametrize(
    ("most", "labels"),
    [
        (4, ["0", "1", "2", "4"]),
        (16, ["0", "1", "2", "4", "8", "2⁴"]),
        (128, ["0", "1", "2", "4", "8", "2⁴", "2⁵", "2⁶", "2⁷"]),
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
