"""Numbers as a sentence has them."""

from __future__ import annotations

import math


def share_text(share: float) -> str:
    """A share of one: 12 %, and under 0.1 % in ppm."""
    if math.isnan(share):
        return "no values"
    return f"{1e6 * share:.3g} ppm" if 0 < share < 0.001 else f"{100 * share:.3g} %"
