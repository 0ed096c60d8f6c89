"""Codes of a number format against exact rational arithmetic."""

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quambase.schema.values.number_format import INT8, NumberFormat

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


def nearest_even(quotient: Fraction) -> int:
    """The nearest integer, of two the even one, by the definition."""
    low = quotient.numerator // quotient.denominator
    rest = quotient - low
    if rest != Fraction(1, 2):
        return low + (rest > Fraction(1, 2))
    return low if low % 2 == 0 else low + 1


@given(
    st.lists(FINITE, min_size=1, max_size=20),
    st.floats(2.0**-20, 2.0**20, width=32),
    st.sampled_from([INT8, NumberFormat("int4", -8, 7), NumberFormat("int16", -32768, 32767)]),
)
def test_codes_are_the_rounded_float32_quotients_clamped(values: list[float], scale: float, f: NumberFormat) -> None:
    with np.errstate(over="ignore"):
        quotients = np.array(values, np.float32) / np.float32(scale)
    wanted = [
        min(max(nearest_even(Fraction(float(q))), f.qmin), f.qmax) if np.isfinite(q) else (f.qmax if q > 0 else f.qmin)
        for q in quotients
    ]
    assert f.quantize(values, scale).tolist() == wanted


def test_the_sizes_of_formats() -> None:
    assert (INT8.codes, INT8.quantize([0.0], 1.0).dtype) == (256, np.dtype(np.int8))
    assert NumberFormat("int16", -32768, 32767).quantize([0.0], 1.0).dtype == np.dtype(np.int16)
    # Rounds to the even 128, which is beyond; just below it does not.
    assert (
        np.rint(INT8.rounds_beyond) > INT8.qmax >= np.rint(np.nextafter(np.float32(INT8.rounds_beyond), np.float32(0)))
    )
