"""Predictions by how many tokens were decoded before them: 0, 1 to 8, then up to each power of two."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SHORTEST = 8
"""Tokens of the first bucket after the prompt's own."""

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


def bucket_of(decoded: Int64) -> Int64:
    """The bucket of each number of tokens: 0 for 0, 1 for 1 to SHORTEST, then one for each doubling."""
    found = np.zeros(decoded.shape, np.int64)
    some = decoded > 0
    # The exponent of 2^e <= x < 2^(e + 1), from an exact float64.
    exponents = np.frexp((np.maximum(decoded[some], SHORTEST) - 1).astype(np.float64))[1]
    found[some] = exponents - int(np.log2(SHORTEST)) + 1
    return found


def bounds_of(bucket: int) -> tuple[int, int]:
    """The fewest and most tokens of a bucket."""
    if bucket == 0:
        return 0, 0
    most = SHORTEST << (bucket - 1)
    return (1 if bucket == 1 else most // 2 + 1), most


def by_position(
    nll: Float64, kl: Float64, agrees: npt.NDArray[np.bool_], owner: Int64, decoded: Int64, documents: int
) -> list[list[dict[str, float]]]:
    """Sums of each document's predictions in each bucket that has any, as rows of `quambase.schema.tables.POSITION`.

    All arguments have an entry for each prediction: its document is ``owner``, ``decoded`` how many tokens were decoded
    before it.
    """
    buckets = bucket_of(decoded)
    width = int(buckets.max(initial=0)) + 1
    place, cells = owner * width + buckets, documents * width
    tokens = np.bincount(place, minlength=cells).reshape(documents, width)
    sums = [np.bincount(place, weights, cells).reshape(documents, width) for weights in (nll, kl)]
    agreed = np.bincount(place[agrees], minlength=cells).reshape(documents, width)
    bounds = [bounds_of(bucket) for bucket in range(width)]
    return [
        [
            {
                "decoded_from": low,
                "decoded_to": high,
                "tokens": int(tokens[document, bucket]),
                "nll": float(sums[0][document, bucket]),
                "kl": float(sums[1][document, bucket]),
                "top1_agreement": int(agreed[document, bucket]),
            }
            for bucket, (low, high) in enumerate(bounds)
            if tokens[document, bucket]
        ]
        for document in range(documents)
    ]
