"""Arrow schemas of every table, and how each is written as Parquet and read."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from quambase.schema.errors import DatabaseInvalid
from quambase.schema.files import replacing

_KEY = [
    pa.field("run", pa.string(), nullable=False),
    pa.field("layer", pa.int32(), nullable=False),
    pa.field("site", pa.string(), nullable=False),
    pa.field("group_name", pa.string(), nullable=False),
]


WORDS = pa.dictionary(pa.int32(), pa.string())
"""Of the key's strings while a run's tables are made and written: of the few there are, each is held once."""


@cache
def as_made(schema: pa.Schema) -> pa.Schema:
    """``schema`` of a run's table with the strings of its key as `WORDS`; stored and read again they are strings."""
    return pa.schema([f.with_type(WORDS) if f in _KEY and pa.types.is_string(f.type) else f for f in schema])


def cast_to(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """``table`` with that schema; itself if it has it, since a cast copies dictionaries and their indices."""
    return table if table.schema.equals(schema) else table.cast(schema)


def _schema(*fields: tuple[str, pa.DataType], key: bool = True) -> pa.Schema:
    return pa.schema([*(_KEY if key else []), *(pa.field(name, kind) for name, kind in fields)])


COUNTS = _schema(("value", pa.float32()), ("count", pa.int64()))
"""One row per distinct value of a group, as a 16-bit value; sorted by value, NaN last."""

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

SITE_STATS = _schema(
    ("count", pa.int64()),
    ("amax", pa.float32()),
    ("min", pa.float32()),
    ("max", pa.float32()),
    ("mean", pa.float64()),
    ("std", pa.float64()),
    ("kurtosis", pa.float64()),
    *((name, pa.float64()) for name in QUANTILES),
    ("outlier_ratio", pa.float64()),
    ("outlier_ratio_q99", pa.float64()),
    ("beyond_3_sigma", pa.float64()),
    ("beyond_5_sigma", pa.float64()),
    ("zeros", pa.float64()),
    ("nonfinite", pa.int64()),
    ("overflow", pa.int64()),
)
"""One row per site (`all`) and per group of a divided site; everything follows from `counts` but `overflow`."""

CHANNELS = _schema(
    ("channel", pa.int32()),
    ("count", pa.int64()),
    ("min", pa.float32()),
    ("max", pa.float32()),
    ("sum", pa.float64()),
    ("sum_sq", pa.float64()),
    ("mean_abs_max", pa.float64()),
    ("nonfinite", pa.int64()),
    ("overflow", pa.int64()),
)
"""One row per channel (at the ssm_state sites per state index, of each group), of the unrounded float32 values."""

DOCUMENTS = _schema(
    ("document", pa.int32()),
    ("tokens", pa.int32()),
    ("sha256", pa.string()),
    ("amax", pa.float32()),
    *((name, pa.float32()) for name in DOCUMENT_QUANTILES),
)
"""One row per document that has a token, for the whole of each site and each group of a divided one."""

OUTLIERS = _schema(
    ("document", pa.int32()),
    ("position", pa.int32()),
    ("token_id", pa.int32()),
    ("token", pa.string()),
    ("channel", pa.int32()),
    ("value", pa.float32()),
)
"""The K largest values of a group: by absolute value, then document, position, channel."""

ACTIVATIONS = _schema(
    ("document", pa.int32()),
    ("position", pa.int32()),
    ("values", pa.list_(pa.float32())),
)
"""Raw activations of sampled tokens: one row per token and group; at the state sites the last token's, flat
(channels of the group, n)."""

GROUPS = _schema(
    ("channels", pa.list_(pa.int32())),
    ("ssd_group", pa.int32()),
    ("head_group", pa.int32()),
    ("channel_group", pa.int32()),
)
"""The channels of each group; the last three are null where it is no SSD group, head group, channel group."""

SCALES = _schema(
    ("strategy", pa.string()),
    ("params", pa.string()),
    ("label", pa.string()),
    ("granularity", pa.string()),
    ("count", pa.int64()),
    ("scale", pa.float32()),
    ("component_scales", pa.list_(pa.float32())),
    ("qmin", pa.int16()),
    ("qmax", pa.int16()),
    ("amax", pa.float32()),
    ("clipped_share", pa.float64()),
    ("mse", pa.float64()),
    ("sqnr_db", pa.float64()),
    ("codes_used", pa.int32()),
    ("codes_above_120", pa.int32()),
    ("entropy_bits", pa.float64()),
    ("consumed", pa.bool_()),
    ("decode_only", pa.bool_()),
    ("needs_decode", pa.bool_()),
    ("clip_safe", pa.bool_()),
    ("selected", pa.bool_()),
)
"""One row per run, layer, site, scale group (`group_name`) and strategy with its parameters (`label` names both). A
table holds the coarser groups too: `granularity` tells them apart, and `count` values share the scale."""

RESULTS = _schema(
    ("evaluation", pa.string()),
    ("model", pa.string()),
    ("scales", pa.string()),
    ("strategy", pa.string()),
    ("task", pa.string()),
    ("data", pa.string()),
    ("document", pa.int32()),
    ("sha256", pa.string()),
    ("tokens", pa.int32()),
    ("nll", pa.float64()),
    ("kl", pa.float64()),
    ("top1_agreement", pa.int32()),
    ("top1_right", pa.int32()),
    ("correct", pa.bool_()),
    ("quantize_lm_head", pa.bool_()),
    ("quantize_embedding", pa.bool_()),
    ("compat_upstream", pa.bool_()),
    key=False,
)
"""One row per evaluated document and strategy (`float` is the floating-point model). nll and kl are sums, in nats,
over `tokens` predicted tokens; top1_agreement and top1_right count those whose most likely token is the floating-point
model's, and the one that follows; `correct` is null unless the task is last-word."""

RUN_TABLES: dict[str, pa.Schema] = {
    "counts": COUNTS,
    "site_stats": SITE_STATS,
    "channels": CHANNELS,
    "documents": DOCUMENTS,
    "outliers": OUTLIERS,
    "activations": ACTIVATIONS,
    "groups": GROUPS,
}
"""The tables of one run folder: each is a file ``<name>.parquet``, or a folder ``<name>/`` of Parquet files."""

# Sorted 16-bit values differ little from their neighbours byte by byte, and most counts are small. Raw activations have
# few exponents, and those of a float16 model end in zeros.
_ENCODINGS = {
    "counts": {"value": "BYTE_STREAM_SPLIT", "count": "DELTA_BINARY_PACKED"},
    "activations": {"values.list.element": "BYTE_STREAM_SPLIT"},
}

_STATISTICS = {"counts": ["layer"]}
"""The columns by which row groups are told apart, of the table where those of the others take long to find."""


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
    """Write one Parquet file atomically; ``name``, the table's, chooses how columns are encoded."""
    made = as_made(schema) if name in RUN_TABLES else schema
    with replacing(path) as temporary, _writer(temporary, name, made) as writer:
        writer.write_table(cast_to(table, made))


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a whole Parquet file and check its columns; DatabaseInvalid if it is missing, cut short or another table."""
    try:
        table = pq.read_table(path, partitioning=None)
    except FileNotFoundError:
        raise DatabaseInvalid(f"{path} is missing; collect again or restore it from a copy") from None
    except (pa.ArrowInvalid, OSError) as error:
        first = str(error).splitlines()[0]
        raise DatabaseInvalid(f"{path} is not a readable Parquet file ({first}); restore it or collect again") from None
    if table.schema.names != schema.names:
        raise DatabaseInvalid(
            f"{path} has the columns {', '.join(table.schema.names)}; expected {', '.join(schema.names)}"
        )
    return table
