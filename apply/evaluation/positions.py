"""Predictions by how many tokens were decoded before them: 0, 1 to 8, then up to each power of two."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quambase.schema.values.arrays import Float64, Int64
from quambase.schema.values.positions import bounds_of, bucket_of


def decoded_bucket(decoded: Int64) -> Int64:
    """The bucket of each number of decoded tokens: 0 for none, else 1 more than `bucket_of`."""
    return np.where(decoded > 0, 1 + bucket_of(np.maximum(decoded, 1)), 0)


def decoded_bounds(bucket: int) -> tuple[int, int]:
    """The fewest and the most decoded tokens of a bucket."""
    return bounds_of(bucket - 1) if bucket else (0, 0)


def by_position(
    nll: Float64, kl: Float64, agrees: npt.NDArray[np.bool_], owner: Int64, decoded: Int64, documents: int
) -> list[list[dict[str, float]]]:
    """Sums of each document's predictions in each bucket that has any, as rows of `quambase.schema.tables.POSITION`.

    All arguments have an entry for each prediction: its document is ``owner``, ``decoded`` how many tokens were decoded
    before it.
    """
    buckets = decoded_bucket(decoded)
    width = int(buckets.max(initial=0)) + 1
    place, cells = owner * width + buckets, documents * width
    tokens = np.bincount(place, minlength=cells).reshape(documents, width)
    sums = [np.bincount(place, weights, cells).reshape(documents, width) for weights in (nll, kl)]
    agreed = np.bincount(place[agrees], minlength=cells).reshape(documents, width)
    bounds = [decoded_bounds(bucket) for bucket in range(width)]
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
