"""What every view, column and macro of the database means: `quambase sql --schema`, docs/database.md.

A stored table and its view have the meanings of `quambase.schema.tables`; a view that views.sql computes has its here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quambase.schema.tables import KEY_MEANINGS, MEANINGS, Meaning

_SITE_KEY = {name: text for name, text in KEY_MEANINGS.items() if name != "group_name"}


def _same(table: str, *columns: str) -> dict[str, str]:
    """The meanings of columns that a view has from a stored table."""
    return {name: MEANINGS[table].columns[name] for name in columns}


_CHANNEL_STATS = {
    **KEY_MEANINGS,
    **_same("channels", "channel", "count", "min", "max"),
    "amax": "Largest absolute value.",
    "mean": "Mean.",
    "std": "Population standard deviation, from sum and sum_sq.",
    "ratio": "amax / median amax of the channels of this layer and site.",
}

_COMPUTED = {
    "channel_stats": Meaning(
        "Mean, spread and reach of each channel, and how far it stands out from its site.", _CHANNEL_STATS
    ),
    "outlier_channels": Meaning(
        "Channels whose largest absolute value is at least 5 times the median channel of their layer and site.",
        _CHANNEL_STATS,
    ),
    "group_spread": Meaning(
        "How unequal the groups of a divided site are.",
        {
            **_SITE_KEY,
            "groups": "How many groups the site has, the smallest ones.",
            "least_amax": "Largest absolute value of the group in which it is least.",
            "largest_amax": "Largest absolute value of the site.",
            "spread": "largest_amax / least_amax.",
            "mean_step": "Mean over the values of their group's amax over the site's: the mean INT8 step of absmax "
            "scales by group, relative to one scale.",
        },
    ),
    "granularity_gain": Meaning(
        "What dividing a site buys: the error of all its groups together, beside that of one scale, per strategy.",
        {
            **_SITE_KEY,
            **_same("scales", "label"),
            "granularity": "How finely scales divide the site: tensor, ssd_group, head_group, group.",
            "groups": "Scales of the site at this granularity.",
            "mse": "Mean squared error over all values of the site.",
            "tensor_mse": "The same with one scale.",
            "gain_db": "10 log10(tensor_mse / mse): 6.02 is one bit; null where an error is 0.",
        },
    ),
    "absolute_counts": Meaning(
        "How often each distinct absolute value occurred, per group and for the whole of each site.",
        {**KEY_MEANINGS, "magnitude": "Absolute value.", **_same("counts", "count")},
    ),
}

_results = MEANINGS["results"]
_COMPUTED |= {
    "results": Meaning(_results.holds, {name: text for name, text in _results.columns.items() if name != "positions"}),
    "results_by_position": Meaning(
        "Evaluations with `--mode decode`: the same sums by how many tokens were decoded before the prediction.",
        {
            **_same("results", "evaluation", "strategy", "task", "data", "document", "cluster"),
            "decoded_from": "Fewest tokens that were decoded one by one, after the prompt, before the prediction.",
            "decoded_to": "Most of them; 0: the prediction of the prompt's last token.",
            "tokens": "Predicted tokens.",
            **_same("results", "nll", "kl", "top1_agreement"),
        },
    ),
}

VIEWS: Mapping[str, Meaning] = {**MEANINGS, **_COMPUTED}
"""By name: those of stored tables, then those computed from them."""

MACROS = {
    "quantile(p)": "Exact p quantile of the absolute value of every group, such as quantile(0.9995).",
    "clipping(scale)": "How many values of every group an INT8 scale clips, and their share, such as clipping(0.05).",
    "regrouped(head_groups, channel_groups)": (
        "The spread of x_conv_out:input (columns as group_spread) in other numbers of groups, such as regrouped(8, 4) "
        "in each SSD group: heads ranked by mean channel amax and channels ranked by amax, cut in equal parts. From "
        "channels, without collecting again."
    ),
}
"""Table macros with their parameters."""


def comments() -> Iterator[str]:
    """A COMMENT statement for every view, column and macro of views.sql."""
    for view, meaning in VIEWS.items():
        yield f"COMMENT ON VIEW {view} IS {_quoted(meaning.holds)};"
        for column, text in meaning.columns.items():
            yield f'COMMENT ON COLUMN {view}."{column}" IS {_quoted(text)};'
    for macro, text in MACROS.items():
        yield f"COMMENT ON MACRO TABLE {macro.partition('(')[0]} IS {_quoted(text)};"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
