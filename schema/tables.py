"""Every table: its columns, their Arrow types and what they mean; how tables are written as Parquet, and read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from quambase.schema.checksums import ALTERED, CHECKSUM, PLACEHOLDER, OwnChecksum, add_checksum, check_own
from quambase.schema.errors import DatabaseInvalid, QuambaseError, first_line
from quambase.schema.files import read_regular, replacing


@dataclass(frozen=True)
class Meaning:
    """What a table or view holds, and what each of its columns means."""

    holds: str
    columns: Mapping[str, str]


MEANINGS: dict[str, Meaning] = {}
"""The meaning of every table, by its name; `quambase.schema.sql.views` has those of the views that SQL computes."""

KEY_MEANINGS = {
    "run": "Run id.",
    "layer": "Layer number from 0; -1 is the language-model head.",
    "site": "Observed point, by upstream Quamba's key, such as in_proj:input.",
    "group_name": "Channel slice of the site (x, z; dt, B, C), or all for the whole of it.",
}

_KEY = [pa.field(name, pa.int32() if name == "layer" else pa.string(), nullable=False) for name in KEY_MEANINGS]


def _table(name: str, holds: str, *columns: tuple[str, pa.DataType, str], key: bool = True) -> pa.Schema:
    """Describe a table in MEANINGS and return its Arrow schema; ``key``: it begins with the key's columns."""
    MEANINGS[name] = Meaning(holds, (KEY_MEANINGS if key else {}) | {column: text for column, _, text in columns})
    return pa.schema([*(_KEY if key else []), *(pa.field(column, kind) for column, kind, _ in columns)])


WORDS = pa.dictionary(pa.int32(), pa.string())
"""Type of the key's strings while tables are built and written: dictionary-encoded, since few distinct ones occur."""


@cache
def as_made(schema: pa.Schema) -> pa.Schema:
    """``schema`` of a run's table with the strings of its key as `WORDS`; stored and read again they are strings."""
    return pa.schema([f.with_type(WORDS) if f in _KEY and pa.types.is_string(f.type) else f for f in schema])


RUNS = _table(
    "runs",
    "One collection each: what was run on what.",
    ("run", pa.string(), "Run id: a hash of everything that determines the tables."),
    ("model", pa.string(), "Name of the model."),
    ("family", pa.string(), "mamba1, mamba2, or tensor for an imported file."),
    ("model_path", pa.string(), "Where the checkpoint was read from."),
    ("n_layer", pa.int64(), "Layers of the model."),
    ("d_model", pa.int64(), "Width of the model."),
    ("headdim", pa.int64(), "Channels of a head (Mamba-2), else null."),
    ("ngroups", pa.int64(), "SSD groups (Mamba-2), else null."),
    ("grouping", pa.string(), "How heads and channels were sorted into groups: fixed, quamba2; else null."),
    ("data", pa.string(), "Name of the text."),
    ("documents", pa.int64(), "Documents in the calibration set."),
    ("empty", pa.int64(), "Documents without a token."),
    ("truncated", pa.int64(), "Documents cut at the sequence length."),
    ("tokens", pa.int64(), "Tokens counted."),
    ("format_version", pa.int64(), "Version of the database layout."),
    ("identity", pa.string(), "Everything that determines the tables, as JSON."),
    ("created", pa.string(), "Versions, host and timings, as JSON."),
    key=False,
)
"""Not stored: one row per manifest."""

COUNTS = _table(
    "counts",
    "How often each distinct 16-bit value occurred: the whole distribution, exactly; sorted by value. Groups only: a "
    "divided site is the sum of its groups.",
    ("value", pa.float32(), "Activation, rounded to the 16-bit type of the run; -0 is 0, NaN comes last."),
    ("count", pa.int64(), "How many times it occurred."),
)

BLOCK_COUNTS = _table(
    "block_counts",
    "The counts of each block of documents by itself (`collect --by-block`; without rows otherwise): they add up to "
    "counts. Sorted by block, then as counts; -0 is 0, NaN comes last.",
    ("block", pa.int32(), "Number of the block: so many consecutive documents share a forward pass (--batch-size)."),
    ("value", pa.float32(), "Activation, rounded to the 16-bit type of the run."),
    ("count", pa.int64(), "How many times it occurred in the block."),
)

SENSITIVITIES = _table(
    "sensitivities",
    "How much the model's output depends on each distinct value of a site whose scale the INT8 model reads, from a few "
    "documents (`collect --sensitivity`; without rows otherwise): half of the sum of gradient_sq times the squared "
    "error of the value, over the tokens of these documents, predicts the KL per token. Groups only, sorted by value.",
    ("value", pa.float32(), "Activation, rounded to the 16-bit type of the run; finite."),
    ("count", pa.int64(), "How many times it occurred in these documents."),
    (
        "gradient_sq",
        pa.float64(),
        "Sum over its occurrences of the squared gradient of the log-likelihood of labels that the model itself drew.",
    ),
)

SECOND_MOMENTS = _table(
    "second_moments",
    "The matrices of second moments of what in_proj, x_proj and out_proj read, over a few documents (`collect "
    "--second-moments`; without rows otherwise), as 4-bit weights by GPTQ need them. Unrounded values; sorted by "
    "layer, site and channel.",
    ("channel", pa.int32(), "The matrix's row: channel index within the site."),
    (
        "values",
        pa.list_(pa.float32()),
        "The row up to its diagonal, since the matrix is symmetric: the sum over the tokens of this channel's value "
        "times that of channel 0, 1, ..., this one.",
    ),
)

QUANTILES: dict[str, float] = {
    "q50": 0.5,
    "q90": 0.9,
    "q95": 0.95,
    "q99": 0.99,
    "q995": 0.995,
    "q999": 0.999,
    "q9995": 0.9995,
    "q9999": 0.9999,
    "q99995": 0.99995,
    "q99999": 0.99999,
}
"""Quantile columns of `site_stats`: of the absolute value, float64 rank p(n-1), linear interpolation."""

DOCUMENT_QUANTILES: dict[str, float] = {name: p for name, p in QUANTILES.items() if p >= 0.99}
"""Quantile columns of `documents`: torch.quantile's rule (float32 rank and interpolation)."""

_SUMMARY = (
    ("count", pa.int64(), "Finite values."),
    ("amax", pa.float32(), "Largest absolute value."),
    ("min", pa.float32(), "Smallest value."),
    ("max", pa.float32(), "Largest value."),
    ("mean", pa.float64(), "Mean."),
    ("std", pa.float64(), "Population standard deviation."),
    ("kurtosis", pa.float64(), "Pearson kurtosis m4/m2^2; 3 for a Gaussian; null without spread."),
    *(
        (name, pa.float64(), f"{100 * p:g} % quantile of the absolute value: rank p(n-1), linear interpolation.")
        for name, p in QUANTILES.items()
    ),
    ("outlier_ratio", pa.float64(), "amax / q9995; null where q9995 is 0."),
    ("outlier_ratio_q99", pa.float64(), "amax / q99; null where q99 is 0."),
    ("beyond_3_sigma", pa.float64(), "Share of values with |x - mean| > 3 std."),
    ("beyond_5_sigma", pa.float64(), "Share of values with |x - mean| > 5 std."),
    ("zeros", pa.float64(), "Share of zeros."),
    ("nonfinite", pa.int64(), "NaN and infinite values; in no other column."),
    ("overflow", pa.int64(), "Finite float32 values that became infinite in 16 bits (part of nonfinite)."),
)

SITE_STATS = _table(
    "site_stats",
    "Summary of each site and of each group of a divided site; everything but overflow follows from counts.",
    *_SUMMARY,
)

_CHANNEL = (
    ("channel", pa.int32(), "Channel index within the site."),
    ("count", pa.int64(), "Finite values."),
    ("min", pa.float32(), "Smallest value."),
    ("max", pa.float32(), "Largest value."),
)
_LOST = (
    ("nonfinite", pa.int64(), "NaN and infinite values."),
    ("overflow", pa.int64(), "Finite values that become infinite in 16 bits."),
)

CHANNELS = _table(
    "channels",
    "Per channel (at the ssm_state_act sites per state index, of each group), of the unrounded float32 values.",
    *_CHANNEL,
    ("sum", pa.float64(), "Sum."),
    ("sum_sq", pa.float64(), "Sum of squares."),
    (
        "mean_abs_max",
        pa.float64(),
        "Largest, over documents, of the document's mean absolute value: upstream's reorder statistic.",
    ),
    *_LOST,
)

_POSITION = (
    ("tokens_from", pa.int32(), "Fewest tokens of the document read so far, the value's own token counted."),
    ("tokens_to", pa.int32(), "Most: 8, 16, 32, ..."),
)
_BY_POSITION = "by how many tokens of the document were read: 1 to 8, then up to each power of two"
_ASKED = "(`collect --by-position`; without rows otherwise)"

POSITION_COUNTS = _table(
    "position_counts",
    f"The counts {_BY_POSITION} {_ASKED}: they add up to counts. Sorted by group, position and value; -0 is 0, NaN "
    "comes last.",
    *_POSITION,
    ("value", pa.float32(), "Activation, rounded to the 16-bit type of the run."),
    ("count", pa.int64(), "How many times it occurred there."),
)

POSITION_STATS = _table(
    "position_stats",
    f"The columns of site_stats {_BY_POSITION} {_ASKED}.",
    *_POSITION,
    *_SUMMARY,
)

POSITION_CHANNELS = _table(
    "position_channels",
    f"The extremes of each channel {_BY_POSITION} {_ASKED}; otherwise as channels.",
    *_POSITION,
    *_CHANNEL,
    *_LOST,
)

DOCUMENTS = _table(
    "documents",
    "Per document that has a token: what replays order-dependent observers.",
    ("document", pa.int32(), "Place of the document in the file, from 0, empty ones counted."),
    ("tokens", pa.int32(), "Tokens of the document."),
    ("sha256", pa.string(), "SHA-256 of its text."),
    ("amax", pa.float32(), "Largest absolute value."),
    *(
        (
            name,
            pa.float32(),
            f"{100 * p:g} % quantile of the absolute value within the document, by torch.quantile in float32.",
        )
        for name, p in DOCUMENT_QUANTILES.items()
    ),
)

OUTLIERS = _table(
    "outliers",
    "The 64 largest values of each group, by absolute value, and the token that made each.",
    ("document", pa.int32(), "Document number."),
    ("position", pa.int32(), "Position of the token in the document, from 0."),
    ("token_id", pa.int32(), "Token id."),
    ("token", pa.string(), "Token text."),
    ("before", pa.string(), "The text before the token, eight words at most; null in runs of earlier versions."),
    ("after", pa.string(), "The text after the token, eight words at most; null in runs of earlier versions."),
    ("channel", pa.int32(), "Channel index within the site."),
    ("value", pa.float32(), "The activation, float32."),
)

ACTIVATIONS = _table(
    "activations",
    "Raw activations of sampled tokens: a row per token and group; at the state sites per document, its last state.",
    ("document", pa.int32(), "Document number."),
    ("position", pa.int32(), "Position of the token in the document, from 0."),
    (
        "values",
        pa.list_(pa.float32()),
        "Activations of the group, in channel order, float32; of a state flat, (channels, n).",
    ),
)

GROUPS = _table(
    "groups",
    "The channels of each group.",
    (
        "channels",
        pa.list_(pa.int32()),
        "Channel indices within the site, as the model that was run has them: a sorted Mamba-2's are sorted.",
    ),
    ("ssd_group", pa.int32(), "SSD group (Mamba-2), else null."),
    ("head_group", pa.int32(), "Head group (Mamba-2), else null."),
    ("channel_group", pa.int32(), "Channel group (Mamba-2), else null."),
)

SCALES = _table(
    "scales",
    "The scale table: one row per scale group and strategy, coarser groups too (granularity tells them apart), for the "
    "runs opened.",
    ("strategy", pa.string(), "Name of the strategy."),
    ("params", pa.string(), "Its parameters, as JSON."),
    ("label", pa.string(), "Name and parameters, as given on the command line."),
    ("granularity", pa.string(), "How finely this group divides its site: tensor, ssd_group, head_group, group."),
    ("count", pa.int64(), "Finite values that share the scale."),
    ("scale", pa.float32(), "INT8 scale: code = clamp(round(x / scale) + zero_point, -128, 127)."),
    ("zero_point", pa.int16(), "The code of 0; 0 but for the affine strategies at sites after SiLU."),
    (
        "component_scales",
        pa.list_(pa.float32()),
        "Scales of the two segments (outlier_piecewise), or of each state index (absmax and quamba at a Mamba-2's "
        "state), else null.",
    ),
    ("qmin", pa.int16(), "Smallest code."),
    ("qmax", pa.int16(), "Largest code."),
    ("amax", pa.float32(), "Largest absolute value of the distribution."),
    ("clipped_share", pa.float64(), "Share of values beyond the codes."),
    ("mse", pa.float64(), "Mean squared error."),
    ("sqnr_db", pa.float64(), "Signal to quantization noise, in dB."),
    (
        "predicted_kl",
        pa.float64(),
        "KL from the float model that this error alone is predicted to cause, nats a token; null where the run has no "
        "sensitivities of the site. Sites add up.",
    ),
    ("codes_used", pa.int32(), "Distinct codes that occur."),
    ("codes_above_120", pa.int32(), "Distinct codes with |code| > 120 that occur."),
    ("entropy_bits", pa.float64(), "Shannon entropy of the codes, in bits."),
    (
        "consumed",
        pa.bool_(),
        "The INT8 model reads this scale (of a site it may read by group, the smallest groups of the table).",
    ),
    ("decode_only", pa.bool_(), "Only token-by-token decoding reads it."),
    ("needs_decode", pa.bool_(), "Not one multiplication: needs a decoder for its segments."),
    ("clip_safe", pa.bool_(), "Upstream's kernel that reads it saturates, or nothing clips."),
    (
        "selected",
        pa.bool_(),
        "The row that apply takes by default: the least predicted KL of its scale group among strategies with one INT8 "
        "scale, the least MSE where there is none (with --target upstream only those that are clip_safe).",
    ),
)

POSITION = pa.struct(
    [
        pa.field("decoded_from", pa.int32(), nullable=False),
        pa.field("decoded_to", pa.int32(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("nll", pa.float64(), nullable=False),
        pa.field("kl", pa.float64(), nullable=False),
        pa.field("top1_agreement", pa.int32(), nullable=False),
    ]
)
"""Of one document: the predicted tokens, and sums over them, whose prediction followed ``decoded_from`` to
``decoded_to`` tokens decoded one by one after the prompt. 0: the prediction of the prompt's last token.
"""

RESULTS = _table(
    "results",
    "Evaluations: one row per document and strategy; nll and kl are sums over the predicted tokens, in nats.",
    ("evaluation", pa.string(), "Evaluation id."),
    ("model", pa.string(), "Model evaluated."),
    ("scales", pa.string(), "Scale table used."),
    ("strategy", pa.string(), "Strategy label; float is the floating-point model."),
    (
        "task",
        pa.string(),
        "What was measured: perplexity, last-word, decode or prefill (both by --mode decode), lm-eval for its tasks.",
    ),
    ("data", pa.string(), "Name of the evaluation text; of lm-eval the task, its filter and metric if it has several."),
    ("document", pa.int32(), "Document number in the evaluation text."),
    ("sha256", pa.string(), "SHA-256 of its text; for lm-eval its doc_hash."),
    (
        "cluster",
        pa.string(),
        "The book, topic or file that the document is a part of; null: not known, it counts alone.",
    ),
    (
        "tokens",
        pa.int32(),
        "Predicted tokens; of several answers to choose from, those of the right one. Null, as the next four, where "
        "the model generates text or it is not known which answer is right.",
    ),
    ("nll", pa.float64(), "Sum of the negative log-likelihood, nats."),
    ("kl", pa.float64(), "Sum of KL(float || quantized), nats."),
    ("top1_agreement", pa.int32(), "Tokens whose most likely token is the floating-point model's."),
    ("top1_right", pa.int32(), "Tokens whose most likely token is the one that follows."),
    ("correct", pa.bool_(), "Last word, or lm-eval's answer, right; null where nothing is right or wrong."),
    ("quantize_lm_head", pa.bool_(), "The head was quantized."),
    ("quantize_embedding", pa.bool_(), "The embedding was quantized."),
    (
        "weight_bits",
        pa.int32(),
        "Bits of the weights of in_proj, x_proj, out_proj; null: the floating-point model, or 8 in an earlier version.",
    ),
    ("gptq", pa.bool_(), "Weights of 4 bits were rounded by GPTQ; null in an earlier version."),
    ("compat_upstream", pa.bool_(), "Upstream's wrap-around was reproduced."),
    (
        "positions",
        pa.list_(POSITION),
        "The same sums by how many tokens were decoded before the prediction; null unless that was measured.",
    ),
    key=False,
)

RUN_TABLES: dict[str, pa.Schema] = {
    "counts": COUNTS,
    "site_stats": SITE_STATS,
    "channels": CHANNELS,
    "documents": DOCUMENTS,
    "outliers": OUTLIERS,
    "activations": ACTIVATIONS,
    "groups": GROUPS,
    "sensitivities": SENSITIVITIES,
    "second_moments": SECOND_MOMENTS,
    "block_counts": BLOCK_COUNTS,
    "position_counts": POSITION_COUNTS,
    "position_stats": POSITION_STATS,
    "position_channels": POSITION_CHANNELS,
}
"""The tables of one run folder: each is a file ``<name>.parquet``, or a folder ``<name>/`` of Parquet files."""

LATER_COLUMNS = {"outliers": {"before": None, "after": None}}
"""The columns that runs of earlier versions lack, by table, and their value there."""

# Sorted 16-bit values differ little from their neighbours byte by byte, and most counts are small. Raw activations have
# few exponents, and those of a float16 model end in zeros.
_COUNTED = {"value": "BYTE_STREAM_SPLIT", "count": "DELTA_BINARY_PACKED"}
_ENCODINGS = {
    "counts": _COUNTED,
    "block_counts": _COUNTED,
    "position_counts": _COUNTED,
    "sensitivities": _COUNTED | {"gradient_sq": "BYTE_STREAM_SPLIT"},
    "activations": {"values.list.element": "BYTE_STREAM_SPLIT"},
    "second_moments": {"values.list.element": "BYTE_STREAM_SPLIT"},
}

_STATISTICS = {"counts": ["layer"], "block_counts": ["layer"], "position_counts": ["layer"]}
"""The columns with statistics, of the tables where those of all columns take long to compute."""

_ROW_GROUPS = {"block_counts": 1 << 16}
"""Rows of a row group, where fewer than the library's default: one layer of all blocks is read at a time."""


def _writer(path: Path, name: str, schema: pa.Schema) -> pq.ParquetWriter:
    words = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_dictionary(f.type)]
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=words,
        column_encoding=_ENCODINGS.get(name),
        write_statistics=_STATISTICS.get(name, True),
        # Statistics of dictionaries are computed batch by batch: in batches of the default 1,024 rows that took half of
        # the time of `counts`.
        write_batch_size=1 << 16,
        # Arrow's own schema would make dictionaries of the strings when they are read; scale tables keep more in it.
        store_schema=name not in RUN_TABLES,
    )


def write_table(path: Path, name: str, table: pa.Table, schema: pa.Schema) -> None:
    """Write one Parquet file atomically; ``name``, the table's, chooses how columns are encoded. A file carries its own
    checksum, except those of RUN_TABLES, of which `run.json` has one.
    """
    made = as_made(schema) if name in RUN_TABLES else schema
    if not table.schema.equals(made):  # a cast copies dictionaries and their indices
        table = table.cast(made)
    with replacing(path) as temporary:
        with _writer(temporary, name, made) as writer:
            writer.write_table(table, row_group_size=_ROW_GROUPS.get(name))
            if name not in RUN_TABLES:
                writer.add_key_value_metadata({CHECKSUM: PLACEHOLDER})
        if name not in RUN_TABLES:
            add_checksum(temporary)


def with_later_columns(table: pa.Table, schema: pa.Schema, later: Mapping[str, Any]) -> pa.Table:
    """``table`` with those columns of ``later`` (name to value) that it lacks, as files of earlier versions do; in the
    order of ``schema`` if it then has all of its columns and no others.
    """
    for name in [name for name in later if name not in table.schema.names]:
        table = table.append_column(name, pa.array([later[name]] * table.num_rows, schema.field(name).type))
    return table.select(schema.names) if sorted(table.schema.names) == sorted(schema.names) else table


MOST_BYTES = 8 << 30
"""Largest accepted size of a table that is read whole, in bytes as its file states it, uncompressed."""


def open_table(
    path: Path, error: type[QuambaseError], advice: str, *, edited: bool = False
) -> tuple[pa.Table, OwnChecksum]:
    """A whole Parquet file and whether its own checksum is right. FileNotFoundError.

    edited  read the file also if its checksum is wrong: a person has changed it

    ``error``, whose line ends in ``advice``: no regular file, altered, not Parquet, or too large for this machine.
    """
    content = read_regular(path, error, advice, MOST_BYTES)
    own = check_own(content)
    if own == "wrong" and not edited:  # before Arrow sees it: some damage makes it end the process
        raise error(f"{path} {ALTERED}; {advice}")
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        about = file.metadata
        groups = [about.row_group(i) for i in range(about.num_row_groups)]
        size, rows = sum(group.total_byte_size for group in groups), sum(group.num_rows for group in groups)
        if rows != about.num_rows:  # Arrow asks for memory for those of the groups
            raise error(f"{path} states {about.num_rows:,} rows, and {rows:,} in its parts; {advice}")
        if (size := max(size, 4 * rows)) > MOST_BYTES:  # the narrowest numbers have 4 bytes
            raise error(f"{path} states a size of {size:,} bytes; expected at most {MOST_BYTES:,}: {advice}")
        # In this thread: one of Arrow's that still holds `content` when Python ends aborts the process.
        table = file.read(use_threads=False)
        table.validate(full=True)  # texts may not be UTF-8
        return table, own
    except (pa.ArrowException, OSError, ValueError) as wrong:  # ValueError: names that are not UTF-8
        raise error(f"{path} is not a readable Parquet file ({first_line(wrong)}); {advice}") from None


def read_table(
    path: Path, schema: pa.Schema, later: Mapping[str, Any] | None = None, *, checked: bool = False
) -> pa.Table:
    """Read a whole Parquet file and check its columns.

    later    as in `with_later_columns`
    checked  the file must have a checksum of its own; otherwise it is compared only if there is one

    DatabaseInvalid: the file is missing, cut short, altered or another table.
    """
    advice = "restore it or make it again"
    try:
        table, own = open_table(path, DatabaseInvalid, advice)
    except FileNotFoundError:
        raise DatabaseInvalid(f"{path} is missing; {advice}") from None
    if checked and own != "right":
        raise DatabaseInvalid(f"{path} {ALTERED}; {advice}")
    if later:
        table = with_later_columns(table, schema, later)
    if table.schema.names != schema.names:
        raise DatabaseInvalid(
            f"{path} has the columns {', '.join(table.schema.names)}; expected {', '.join(schema.names)}"
        )
    try:
        return table.cast(schema)
    except (pa.ArrowException, ValueError) as wrong:
        raise DatabaseInvalid(f"{path} holds columns of other types ({first_line(wrong)}); {advice}") from None
