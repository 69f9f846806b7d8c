"""Changes of bytes, whatever they are."""

import random

INTEGERS = (
    0,
    1,
    2,
    7,
    8,
    64,
    127,
    128,
    255,
    256,
    4096,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
"""Numbers at the ends of ranges."""


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Return the bytes with one to four changes: bits, bytes, numbers, pieces left out, repeated or moved."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(_CHANGES)(rng, changed)
    return bytes(changed)


def _flip(rng: random.Random, changed: bytearray) -> None:
    if changed:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, changed: bytearray) -> None:
    if changed:
        changed[rng.randrange(len(changed))] = rng.choice(
            (0, 1, 0x22, 0x5C, 0x7B, 0x7F, 0x80, 0xFF, rng.randrange(256))
        )


def _insert(rng: random.Random, changed: bytearray) -> None:
    at = rng.randrange(len(changed) + 1)
    changed[at:at] = rng.randbytes(rng.choice((1, 1, 2, 4, 8, 64)))


def _delete(rng: random.Random, changed: bytearray) -> None:
    at = rng.randrange(len(changed) + 1)
    del changed[at : at + rng.choice((1, 1, 2, 4, 8, 64))]


def _cut(rng: random.Random, changed: bytearray) -> None:
    del changed[rng.randrange(len(changed) + 1) :]


def _repeat(rng: random.Random, changed: bytearray) -> None:
    start = rng.randrange(len(changed) + 1)
    piece = changed[start : start + rng.randrange(1, 64)]
    at = rng.randrange(len(changed) + 1)
    changed[at:at] = piece * rng.choice((1, 1, 2, 50))


def _move(rng: random.Random, changed: bytearray) -> None:
    start = rng.randrange(len(changed) + 1)
    piece = changed[start : start + rng.randrange(1, 64)]
    del changed[start : start + len(piece)]
    at = rng.randrange(len(changed) + 1)
    changed[at:at] = piece


def _number(rng: random.Random, changed: bytearray) -> None:
    width = rng.choice((1, 2, 4, 8))
    at = rng.randrange(len(changed) + 1)
    number = rng.choice(INTEGERS) + rng.choice((-1, 0, 0, 1))
    changed[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")


def _shift(rng: random.Random, changed: bytearray) -> None:
    """Add a small number to one of four bytes."""
    at = rng.randrange(len(changed) + 1)
    number = int.from_bytes(changed[at : at + 4], "little") + rng.randrange(-16, 17)
    changed[at : at + 4] = (number % 2**32).to_bytes(4, "little")


_CHANGES = (_flip, _flip, _set, _insert, _delete, _cut, _repeat, _move, _number, _number, _shift)
