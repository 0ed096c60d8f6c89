"""Buckets of token counts: 1 to 8 tokens, then up to each power of two."""

from __future__ import annotations

import numpy as np

from quambase.schema.values.arrays import Int64

SHORTEST = 8
"""Tokens of the first bucket."""


def bucket_of(tokens: Int64) -> Int64:
    """The bucket of each number of tokens, 1 or more: 0 for 1 to SHORTEST, then one for each doubling."""
    # The exponent of 2^e <= x < 2^(e + 1), from an exact float64.
    exponents = np.frexp((np.maximum(tokens, SHORTEST) - 1).astype(np.float64))[1]
    return exponents.astype(np.int64) - int(np.log2(SHORTEST))


def bounds_of(bucket: int) -> tuple[int, int]:
    """The fewest and the most tokens of a bucket."""
    most = SHORTEST << bucket
    return (1 if bucket == 0 else most // 2 + 1), most


def buckets_of(tokens: int) -> int:
    """How many buckets documents of at most ``tokens`` tokens reach; 0 without tokens."""
    return int(bucket_of(np.array([tokens]))[0]) + 1 if tokens else 0
