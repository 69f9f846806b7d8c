"""Summarization pairs out of docstrings: the prose of the body, and the line its author summed it up in.

Packages are read with ``ast``, not imported: a docstring is in the source whether or not the module can run
here.
"""

import ast
import importlib.metadata
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from loracle.reference import FileError

_UNDERLINE = re.compile(r"\s*([-=~^])\1{2,}\s*")
_SIGNATURE = re.compile(r"[\w.]+\(.*\)(\s*->.*)?")
_ROLE = re.compile(r":(?:\w+:)+(?=`)")
_REFERENCE = re.compile(r"\s*\[\d+\]_")
_LINK = re.compile(r"(`+)~?([^`]+?)(\s<[^`<>]*>)?(`+_?)")
_SKIPPED_FOLDERS = {"tests", "testing", "distutils", "f2py", "_external", "externals", "array_api_compat"}
_BODY_WORDS = range(20, 161)
_SUMMARY_WORDS = range(4, 21)


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """Return (body, summary) of a docstring in numpydoc's form, or None where it is no pair to learn from.

    The summary is the first paragraph (the second, where the first is a signature). The body is the prose
    between it and the first section, doctest or table: directives, literal blocks, lists and displayed
    formulas are left out, and so is the markup of roles, links and footnotes. White space is made plain. None
    unless the body has 20 to 160 words and the summary 4 to 20, and unless the summary says something that
    the body does not say verbatim.
    """
    paragraphs = [part for part in re.split(r"\n\s*\n", inspect.cleandoc(docstring)) if part.strip()]
    if paragraphs and _SIGNATURE.fullmatch(_plain(paragraphs[0])):
        paragraphs = paragraphs[1:]
    if not paragraphs or not _is_prose(paragraphs[0]):
        return None
    summary = _plain(paragraphs[0])
    body = " ".join(_plain(part) for part in _until_section(paragraphs[1:]) if _is_prose(part))
    if (
        len(body.split()) not in _BODY_WORDS
        or len(summary.split()) not in _SUMMARY_WORDS
        or summary.endswith(":")
        or summary.rstrip(".").casefold() in body.casefold()
    ):
        return None
    return body, summary


def _until_section(paragraphs: Sequence[str]) -> Iterator[str]:
    for part in paragraphs:
        if ">>>" in part or any(_UNDERLINE.fullmatch(line) for line in part.splitlines()):
            return
        yield part


def _is_prose(paragraph: str) -> bool:
    """Say whether a paragraph is text: no literal block or formula (indented), directive, list or table."""
    first = paragraph.lstrip("\n")
    return not first.startswith((" ", "..", "- ", "* ", "+", "|", "1.", "(1)", "=")) and "::" not in paragraph


def _plain(paragraph: str) -> str:
    text = _REFERENCE.sub("", _ROLE.sub("", " ".join(paragraph.split())))
    return _LINK.sub(r"\2", text)


def docstrings(root: Path) -> Iterator[str]:
    """Yield the docstrings of a package's modules and of its public classes and functions, by path and line.

    Args:
        root: the package's folder. Folders of tests, of vendored code and of build tools are left out.

    Raises:
        FileError: a file cannot be read, or is no Python source.
    """
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = _parse(path)
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise FileError(
                f"{path}: expected Python source, got {error}; install the package again"
            ) from error
        documented = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and not getattr(node, "name", "").startswith("_")
        ]
        for node in sorted(documented, key=lambda node: getattr(node, "lineno", 0)):
            if docstring := ast.get_docstring(node):
                yield docstring


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        # An invalid escape in a docstring is its author's affair.
        warnings.simplefilter("ignore")
        return ast.parse(path.read_text("utf-8"), filename=str(path))


def docstring_pairs(packages: Sequence[str]) -> list[tuple[str, str]]:
    """Return the (body, summary) pairs of installed packages, in the packages' order.

    Raises:
        FileError: a package is not installed.
    """
    return [
        pair
        for package in packages
        for docstring in docstrings(_package_folder(package))
        if (pair := split_docstring(docstring)) is not None
    ]


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the installed version of each package; the pairs depend on it."""
    return {package: importlib.metadata.version(package) for package in packages}


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileError(f"{package}: expected an installed package, got none; install it with pip")
    return Path(spec.submodule_search_locations[0])
