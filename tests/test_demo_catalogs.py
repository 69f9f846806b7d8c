"""Catalogs are read as the standard library reads them, and cleaned."""

import gettext
import io
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.demo.catalogs import clean_pair, read_catalog, translation_pairs
from loracle.reference import FileError

HEADER = ("", "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n > 1;\n")


def compile_catalog(pairs: list[tuple[str, str]], order: str = "<") -> bytes:
    """Return the ``.mo`` file with these entries, as msgfmt lays it out, without a hash table."""
    texts = [text.encode() for column in zip(*sorted(pairs), strict=True) for text in column]
    offset, table, strings = 28 + 8 * len(texts), b"", b""
    for text in texts:
        table += struct.pack(f"{order}2I", len(text), offset + len(strings))
        strings += text + b"\0"
    header = struct.pack(f"{order}7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return header + table + strings


TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\x04"), min_size=1)


@given(st.dictionaries(TEXT, TEXT, min_size=1), st.sampled_from("<>"))
def test_reads_what_gettext_reads(entries: dict[str, str], order: str) -> None:
    data = compile_catalog([HEADER, *entries.items()], order)
    library = gettext.GNUTranslations(io.BytesIO(data))
    read = read_catalog(data, "fr.mo")
    assert [source for source, _ in read] == sorted(entries)
    assert {source: library.gettext(source) for source in entries} == dict(read)


def test_plural_forms_context_and_header() -> None:
    entries = [
        HEADER,
        ("%d day\0%d days", "%d jour\0%d jours"),
        ("month\x04May", "mai"),
        ("Save", "Enregistrer"),
    ]
    assert read_catalog(compile_catalog(entries), "fr.mo") == [
        ("%d days", "%d jours"),
        ("Save", "Enregistrer"),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a gettext .mo file, got magic b''"),
        (b"PK\x03\x04 rest", "expected a gettext .mo file, got magic b'PK"),
        (compile_catalog([HEADER])[:20], "expected a whole gettext .mo file"),
        (compile_catalog([HEADER])[:40], "expected a whole gettext .mo file"),
        (
            compile_catalog([("a", "b")])[:-2],
            "expected a whole gettext .mo file, got a string that ends at 47 of 46 bytes",
        ),
        (compile_catalog([("a", "b")])[:-2] + b"\xff\0", "expected a whole gettext .mo file"),
    ],
)
def test_malformed_catalogs_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(FileError, match=f"^fr.mo: {message}"):
        read_catalog(data, "fr.mo")


@pytest.mark.parametrize(
    ("original", "translation", "expected"),
    [
        (" Log  out ", "Se\xa0déconnecter", ("Log out", "Se déconnecter")),
        (
            "Enter a valid %(name)s.",
            "Saisissez %(name)s.",
            ("Enter a valid %(name)s.", "Saisissez %(name)s."),
        ),
        ("Save", "", None),
        ("Actions", "actions", None),
        ("one\ntwo lines", "deux lignes", None),
        ("<b>Bold</b> text here", "Texte gras", None),
        ("Bold text here", "Texte <b>gras</b>", None),
        ("Save &amp; close", "Enregistrer et fermer", None),
        ("word " * 30, "mot", ("word " * 29 + "word", "mot")),
        ("word " * 31, "mot", None),
        ("PM", "Après-midi", None),
        ("Sun", "dim", None),
        ("Time", "Heure", ("Time", "Heure")),
        ("%(name)s %(value)s of", "%(name)s %(value)s de", None),
        ("%(name)s %(value)s of %(total)s", "%(name)s de", None),
        ("%s: %d (of the)", "%s : %d (de la)", None),
    ],
)
def test_clean_pair(original: str, translation: str, expected: tuple[str, str] | None) -> None:
    assert clean_pair(original, translation) == expected


def test_pairs_of_a_wheel_are_those_of_one_language_in_the_order_of_names(tmp_path: Path) -> None:
    wheel = tmp_path / "site.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, entry in {
            "site/z/locale/fr/LC_MESSAGES/django.mo": ("Delete", "Supprimer"),
            "site/a/locale/fr/LC_MESSAGES/django.mo": ("Close", "Fermer"),
            "site/a/locale/fr_CA/LC_MESSAGES/django.mo": ("Close", "Clore"),
            "site/a/locale/de/LC_MESSAGES/django.mo": ("Close", "Schließen"),
        }.items():
            archive.writestr(name, compile_catalog([HEADER, entry]))
        archive.writestr("site/a/locale/fr/LC_MESSAGES/django.po", "no catalog")
    assert translation_pairs(wheel, "fr") == [("Close", "Fermer"), ("Delete", "Supprimer")]
    with pytest.raises(FileError, match=r"expected catalogs at \*/locale/es/, got none"):
        translation_pairs(wheel, "es")


def test_what_is_no_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "site.whl").write_text("no archive")
    for name in ("site.whl", "missing.whl"):
        with pytest.raises(FileError, match=f"{name}: expected a wheel, got"):
            translation_pairs(tmp_path / name, "fr")
