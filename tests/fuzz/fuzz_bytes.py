"""Changes bytes without knowing what they mean."""

from __future__ import annotations

from random import Random

INTEGERS = tuple(
    sorted(
        {
            sign * (2**power + step)
            for power in (0, 7, 8, 15, 16, 24, 31, 32, 47, 62, 63, 64)
            for step in (-1, 0, 1)
            for sign in (1, -1)
        }
    )
)
"""Numbers at which integer types end."""

TEXTS = (
    b"\x00",
    b"\n",
    b"\r\n\r\n",
    b'"',
    b"{",
    b"[",
    b",",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\x1b[31m",
)


def boundary(random: Random) -> bytes:
    """A number at which an integer type ends, in one, two, four or eight bytes."""
    size = random.choice((1, 2, 4, 4, 8, 8))
    return (random.choice(INTEGERS) % 256**size).to_bytes(size, random.choice(("little", "little", "big")))


def change_once(random: Random, data: bytes, other: bytes) -> bytes:
    """``data`` with one change; ``other``: what parts may be taken from."""
    place = random.randrange(len(data) + 1)
    size = min(len(data) - place, random.choice((1, 1, 2, 4, 8, 16, 64, 512)))
    end = place + size
    kind = random.randrange(11)
    if kind <= 1 and size:
        flipped = data[place] ^ (1 << random.randrange(8))
        return data[:place] + bytes([flipped]) + data[place + 1 :]
    if kind == 2:
        return data[:place] + random.randbytes(size) + data[end:]
    if kind == 3:
        return data[:place] + data[end:]
    if kind == 4:
        return data[:place] + random.choice((*TEXTS, random.randbytes(size))) + data[place:]
    if kind == 5:
        return data[:place]
    if kind == 6:
        return data[:place] + data[place:end] * random.choice((2, 3, 50)) + data[end:]
    if kind == 7:
        elsewhere = random.randrange(len(data) + 1)
        low, high = sorted((place, elsewhere))
        return (
            data[:low]
            + data[high : high + size]
            + data[low + size : high]
            + data[low : low + size]
            + data[high + size :]
        )
    if kind == 8:
        start = random.randrange(len(other) + 1)
        return data[:place] + other[start:]
    number = boundary(random)
    return data[:place] + number + data[place + len(number) :]


def change_bytes(random: Random, data: bytes, other: bytes = b"") -> bytes:
    """``data`` with one to four changes, in any place or near an end."""
    changes = random.choice((1, 1, 1, 2, 4))
    window = random.choice((0, 0, 64, 1024))
    if not window or len(data) <= 2 * window:
        for _ in range(changes):
            data = change_once(random, data, other or data)
        return data
    if random.random() < 0.5:
        head, tail = data[:window], data[window:]
        for _ in range(changes):
            head = change_once(random, head, other or data)
        return head + tail
    head, tail = data[:-window], data[-window:]
    for _ in range(changes):
        tail = change_once(random, tail, other or data)
    return head + tail
