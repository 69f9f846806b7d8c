"""Text from other people's files, as a person may be shown it."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return the text with an escape such as `\\x1b` in the place of each character that is not printed.

    Names of tensors may hold anything: what moves a terminal's cursor, what turns the direction of writing,
    half a character. Spaces other than the plain one count as not printed.
    """
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
