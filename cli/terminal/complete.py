"""Shell completion of models, texts, sites, strategies and runs. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from quambase.schema.sites import SITE_NAMES


def _beginning(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Bundled models, short names; and folders, which the shell finds."""
    from quambase.model.inputs.names import SHORT_NAMES, bundled_models

    found = _beginning([*bundled_models(), *SHORT_NAMES], incomplete)
    return found or [CompletionItem(incomplete, type="dir")]


def complete_texts(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of texts; and files, which the shell finds."""
    from quambase.model.inputs.names import BUNDLED_DATA, HUB_DATA, PYTHON_DOCS

    found = _beginning([*BUNDLED_DATA, *PYTHON_DOCS, *HUB_DATA], incomplete)
    return found or [CompletionItem(incomplete, type="file")]


def complete_sites(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Sites of either family."""
    return _beginning(SITE_NAMES, incomplete)


def complete_strategies(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Every registered strategy."""
    from quambase.analyzer.strategies import DEFAULT_LABELS, STRATEGIES

    return _beginning(dict.fromkeys(["all", *DEFAULT_LABELS, *STRATEGIES]), incomplete)


def complete_labels(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Strategies of the scale table that the command reads."""
    from quambase.schema.errors import QuambaseError
    from quambase.schema.scale_table import MIXED, SELECTED, read_scales

    try:
        table = read_scales(Path(ctx.params.get("scales") or "scales.parquet"))
    except QuambaseError:
        return complete_strategies(ctx, param, incomplete)
    return _beginning(["all", SELECTED, *([MIXED] if table.in_16_bit else []), *table.labels()], incomplete)


def complete_runs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Runs of the database that the command reads."""
    from quambase.schema.errors import DatabaseInvalid
    from quambase.schema.stored.runs import list_runs

    try:
        complete, _ = list_runs(Path(ctx.params.get("db") or "quambase-db"))
    except DatabaseInvalid:
        return []
    return _beginning([path.name for path in complete], incomplete)
