"""The yardstick of outliers against its definition, and the site that it is about."""

import math

import numpy as np
import pytest

from quambase.schema.sql.yardstick import (
    DECODING,
    EVALUATED,
    HEAD,
    UNREAD,
    outlier_line,
    outlier_ratio,
    outlier_word,
    reader,
    worst_site,
)


@pytest.mark.parametrize(
    ("ratio", "word"),
    [(1.0, "mild"), (2.99, "mild"), (3.0, "notable"), (9.99, "notable"), (10.0, "severe"), (math.inf, "severe")],
)
def test_words(ratio: float, word: str) -> None:
    assert outlier_word(ratio) == word


def test_a_ratio_that_is_not_known_has_no_word() -> None:
    assert outlier_word(math.nan) == "unknown"
    assert outlier_ratio(0.0, 0.0) == 1 and outlier_ratio(5.0, 0.0) == math.inf and outlier_ratio(6.0, 2.0) == 3
    assert math.isnan(outlier_ratio(math.nan, 0.0))


@pytest.mark.parametrize("ratio", [1.0, 2.0, 3.0, 10.0])
def test_bits_lost_are_those_of_counted_codes(ratio: float) -> None:
    """NOTABLE and SEVERE are said to cost log2(ratio) bits. Values up to 1 beside one outlier of ``ratio``: the codes
    that max/127 leaves them, counted one by one.
    """
    values = np.linspace(-1, 1, 100_001)
    codes = len(np.unique(np.rint(values / (ratio / 127))))
    whole = len(np.unique(np.rint(values * 127)))
    # Rounding adds or takes at most one code at each end, of 2 x 12 or more: log2(25 / 23) is 0.12 bits.
    assert math.log2(ratio) == pytest.approx(math.log2(whole / codes), abs=0.12)


def row(site: str, amax: float, group: str = "all", layer: int = 0) -> dict[str, object]:
    return {"layer": layer, "site": site, "group_name": group, "amax": amax, "q9995": 2.0}


def test_what_reads_a_site() -> None:
    assert reader("x_proj:input", "mamba1") == EVALUATED and reader("ssm_state_act:input", "mamba1") == DECODING
    assert reader("lm_head:input", "mamba2") == HEAD and reader("dt_proj:input", "mamba1") == UNREAD
    assert reader("anything", "tensor") == EVALUATED


def test_the_worst_site_acts_in_evaluation_and_is_whole() -> None:
    rows = [
        row("ssm_state_act:input", 90.0),
        row("dt_proj:input", 80.0),
        row("lm_head:input", 70.0, layer=-1),
        row("in_proj:output", 60.0, "x"),
        row("in_proj:output", 8.0, layer=6),
        row("x_proj:input", 7.0),
        row("x_proj:input", math.nan),
    ]
    worst = worst_site(rows, "mamba1", EVALUATED)
    assert worst is not None
    assert outlier_line(worst) == "notable: 4x at layer 6 in_proj:output (largest 8, 99.95 % 2)"
    assert worst_site(rows, "mamba1", DECODING) is rows[0] and worst_site(rows[1:], "mamba1", DECODING) is None
