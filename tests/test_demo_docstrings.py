"""Docstrings become pairs of prose and summary, without running the code they are in."""

from pathlib import Path

import pytest

from loracle.demo.docstrings import docstring_pairs, docstrings, package_versions, split_docstring
from loracle.reference import FileError

SUMMARY = "Return the sum of both."
BODY = " ".join(["The numbers are added one by one, and the total is what comes back."] * 2)


def body_of(docstring: str) -> str | None:
    pair = split_docstring(docstring)
    return None if pair is None else pair[0]


def test_summary_and_body() -> None:
    assert split_docstring(f"{SUMMARY}\n\n    {BODY}\n    ") == (BODY, SUMMARY)


@pytest.mark.parametrize(
    ("between", "kept"),
    [
        ("Parameters\n----------\nx : int\n    The first.", ""),
        ("Notes\n=====\nMore.", ""),
        (">>> add(1, 2)\n3", ""),
        (".. deprecated:: 1.0\n   Use another.", None),
        ("- one\n- two", None),
        ("* one\n* two", None),
        ("    indented = literal", None),
        ("An example follows::", None),
        ("+---+\n| a |\n+---+", None),
    ],
)
def test_sections_end_the_body_and_blocks_fall_out_of_it(between: str, kept: str | None) -> None:
    after = "The paragraph after it."
    assert body_of(f"{SUMMARY}\n\n{BODY}\n\n{between}\n\n{after}") == (
        BODY if kept == "" else f"{BODY} {after}"
    )


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ("``axis``", "axis"),
        ("`numpy.sum`", "numpy.sum"),
        (":func:`~numpy.sum`", "numpy.sum"),
        (":py:meth:`sum`", "sum"),
        ("`the guide <guide.html>`_", "the guide"),
        ("``a < b``", "a < b"),
        ("a method [12]_ of old", "a method of old"),
        ("two   spaces\nand a line", "two spaces and a line"),
    ],
)
def test_markup_is_made_plain(markup: str, plain: str) -> None:
    assert body_of(f"{SUMMARY}\n\n{BODY} {markup}") == f"{BODY} {plain}"


@pytest.mark.parametrize(
    ("docstring", "found"),
    [
        ("", False),
        (SUMMARY, False),
        (f"{SUMMARY}\n\n{'word ' * 19}", False),
        (f"{SUMMARY}\n\n{'word ' * 20}", True),
        (f"{SUMMARY}\n\n{'word ' * 160}", True),
        (f"{SUMMARY}\n\n{'word ' * 161}", False),
        (f"Return the sum.\n\n{BODY}", False),
        (f"{'Sum ' * 20}\n\n{BODY}", True),
        (f"{'Sum ' * 21}\n\n{BODY}", False),
        (f"Return the sum of both:\n\n{BODY}", False),
        (f".. function that adds them\n\n{BODY}", False),
        (f"The total is what comes back.\n\n{BODY}", False),
        (f"The numbers are added one by one.\n\n{BODY}", False),
    ],
)
def test_what_is_a_pair(docstring: str, found: bool) -> None:
    assert (split_docstring(docstring) is not None) is found


def test_a_signature_is_no_summary() -> None:
    assert split_docstring(f"add(x, y=(0, 1)) -> int\n\n{SUMMARY}\n\n{BODY}") == (BODY, SUMMARY)


@pytest.mark.filterwarnings("error")
def test_docstrings_in_the_order_of_paths_and_lines(tmp_path: Path) -> None:
    files = {
        "b.py": '"""B."""\nclass C:\n    """C."""\n    def f(self):\n        """f."""\n    def _g(self):\n'
        '        """g."""\ndef k():\n    """k."""\n',
        "a/z.py": 'async def h():\n    """h."""\ndef bad():\n    """\\d is no escape."""\nraise SystemExit\n',
        "a.py": "x = 1\n",
        "tests/t.py": '"""T."""\n',
        "a/_external/e.py": '"""E."""\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(docstrings(tmp_path)) == ["h.", "\\d is no escape.", "B.", "C.", "f.", "k."]


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f(:")
    with pytest.raises(FileError, match=r"broken\.py: expected Python source, got invalid syntax"):
        list(docstrings(tmp_path))


def test_the_installed_numpy_has_pairs() -> None:
    pairs = docstring_pairs(["numpy"])
    assert len(pairs) > 200
    assert "Compute the arithmetic mean along the specified axis." in {summary for _, summary in pairs}
    for body, summary in pairs:
        assert summary.casefold() not in body.casefold()
        assert ">>>" not in body
        assert "\n" not in body + summary


def test_packages_that_are_not_there() -> None:
    with pytest.raises(FileError, match="no_such_package: expected an installed package, got none"):
        docstring_pairs(["no_such_package"])


def test_package_versions() -> None:
    import numpy as np

    assert package_versions(["numpy"]) == {"numpy": np.__version__}
