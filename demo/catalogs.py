"""Translation pairs out of compiled gettext catalogs.

The format of a ``.mo`` file is GNU gettext's (manual, "The Format of GNU MO Files"): a header of seven 32-bit
words, then two tables of (length, offset) pairs, one for the originals and one for the translations. The
standard library reads it too, but keeps neither the plural originals nor a public way to list the entries.
"""

import re
import struct
import zipfile
from pathlib import Path

from loracle.reference import FileError

_MAGIC = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}
_PLACEHOLDER = re.compile(r"%\(\w+\)[a-z]|%[a-z%]|\{\w*\}")
_MOST_WORDS = 30
_FEWEST_LETTERS = 4


def read_catalog(data: bytes, name: str) -> list[tuple[str, str]]:
    """Return the (original, translation) pairs of an ``.mo`` file, in the file's order.

    Of an entry with plural forms the plural is taken: the plural original with the last translated form.
    Entries that are told apart by a context are left out, for the text alone does not decide their
    translation; so is the header.

    Args:
        data: the file's bytes; strings are UTF-8.
        name: what to call the file in a message.

    Raises:
        FileError: the bytes are no such file.
    """
    order = _MAGIC.get(data[:4])
    if order is None:
        raise FileError(f"{name}: expected a gettext .mo file, got magic {data[:4]!r}; fetch the file again")
    try:
        count, originals, translations = struct.unpack_from(f"{order}3I", data, 8)
        pairs = [
            (_string(data, order, originals + 8 * i), _string(data, order, translations + 8 * i))
            for i in range(count)
        ]
    except (struct.error, UnicodeDecodeError) as error:
        raise FileError(f"{name}: expected a whole gettext .mo file, got {error}; fetch it again") from error
    return [
        (original.split("\0")[-1], translation.split("\0")[-1])
        for original, translation in pairs
        if original and "\x04" not in original
    ]


def _string(data: bytes, order: str, entry: int) -> str:
    length, offset = struct.unpack_from(f"{order}2I", data, entry)
    if offset + length > len(data):
        raise struct.error(f"a string that ends at {offset + length} of {len(data)} bytes")
    return data[offset : offset + length].decode("utf-8")


def clean_pair(original: str, translation: str) -> tuple[str, str] | None:
    """Return the pair with its white space made plain, or None where it teaches no translation.

    Left out: an empty side, equal sides, several lines, HTML, more than 30 words, fewer than four letters,
    and text with more characters in placeholders and signs than in letters.
    """
    source, target = (" ".join(text.split()) for text in (original, translation))
    words = _PLACEHOLDER.sub("", source)
    letters = sum(character.isalpha() for character in words)
    if (
        not target
        or source.casefold() == target.casefold()
        or "\n" in original.strip()
        or any(sign in source + target for sign in "<>&")
        or len(source.split()) > _MOST_WORDS
        or letters < _FEWEST_LETTERS
        or 2 * letters < len("".join(source.split()))
    ):
        return None
    return source, target


def translation_pairs(wheel: Path, language: str) -> list[tuple[str, str]]:
    """Return the clean pairs of every catalog for ``language`` in a wheel, ordered by catalog and original.

    Args:
        wheel: a wheel whose catalogs lie at ``*/locale/<language>/LC_MESSAGES/*.mo``.
        language: the folder's name, such as ``fr``.

    Raises:
        FileError: the wheel is no zip archive, a catalog is malformed, or there is none.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(n for n in archive.namelist() if f"/locale/{language}/" in n and n.endswith(".mo"))
            catalogs = {name: archive.read(name) for name in names}
    except (OSError, zipfile.BadZipFile) as error:
        raise FileError(f"{wheel}: expected a wheel, got {error}; remove the file and try again") from error
    if not catalogs:
        raise FileError(f"{wheel}: expected catalogs at */locale/{language}/, got none; try another wheel")
    found = (clean_pair(*pair) for name, data in catalogs.items() for pair in read_catalog(data, name))
    return [pair for pair in found if pair is not None]
