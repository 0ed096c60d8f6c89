"""Makes the HTML: a Jinja2 template, one style sheet, one script, the vendored scripts, and the data, packed once."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import shlex
from collections.abc import Iterable
from importlib.metadata import version
from importlib.resources import files
from typing import Any
from urllib.parse import quote

import jinja2

from quambase.analyzer.pictures.numbers.evaluation import evaluated_texts
from quambase.analyzer.pictures.numbers.positions import Positions, tokens
from quambase.analyzer.pictures.numbers.site_grid import CLIPPED_SHARE, OUTLIER_RATIO, PREDICTED_KL, SQNR, SiteGrid
from quambase.analyzer.summary import summarize
from quambase.apply.evaluation.decode_summary import base_of, sentences, table
from quambase.apply.evaluation.summary_text import Ranking
from quambase.report.answer import Answer
from quambase.report.contents import Contents
from quambase.report.drawing import DRAWINGS
from quambase.report.provenance import commands, facts
from quambase.report.site_pages import short, shorts
from quambase.schema.commands import of_database
from quambase.schema.errors import QuambaseError
from quambase.schema.files import MARK
from quambase.schema.sites import WHOLE
from quambase.schema.stored.results import FLOAT

SCRIPTS = ("vega", "vega-lite", "vega-embed")
"""The vendored ones, in the order in which they need each other."""

PICTURES = (
    "distribution", "error", "channels", "strategies", "evaluation", "decoding", "positions", "convergence",
)  # fmt: skip
"""The Vega-Lite specifications: without data, whose names and columns the descriptions in them give."""

MEASURES = (
    (PREDICTED_KL, "predicted effect", "KL x1000, thousandths of a nat a token that the errors here should cost"),
    (OUTLIER_RATIO, "outlier ratio", "the largest |x| over the 99.95 % quantile of |x|"),
    (SQNR, "SQNR", "signal over squared error, dB; 6 dB are one bit"),
    (CLIPPED_SHARE, "clipped share", "the share of values that lie beyond the last code"),
)
"""What the heat map can show, the first of which there are numbers first: key, name, meaning."""


def render(contents: Contents, ranked: list[Ranking], answer: Answer) -> str:
    """The page, as text, of its contents, the texts of its evaluation and the answer. Equal ones give equal pages."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _text("templates", name)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"number": number, "share": share, "thousandths": thousandths, "anchor": anchor}
    environment.filters |= filters
    scripts = [*(_text("vendored", f"{name}.min.js") for name in SCRIPTS), _text("templates", "page.js")]
    for script in scripts:
        if "</script" in script.lower() or "<!--" in script:
            raise QuambaseError("a script of the report would end its own element; reinstall quambase")
    grid = contents.grids[0]
    return environment.get_template("page.html").render(
        mark=MARK,
        version=version("quambase"),
        vega=_vega_version(),
        contents=contents,
        manifest=contents.manifest,
        answer=answer,
        ranked=ranked,
        generated=_self_generated(contents),
        measures=measures(contents.grids),
        grid=grid,
        worst=worst_layers(grid),
        known={(page["layer"], page["site"]) for page in contents.pages},
        cells=_cells(grid),
        drawing=DRAWINGS.get(contents.manifest.model.family),
        strategies=[] if contents.rows is None else summarize(contents.rows).to_pylist(),
        selected=_selected(contents),
        decoding=_decoding(contents),
        positions=_positions(contents),
        facts=facts(contents),
        commands=commands(contents),
        style=_text("templates", "style.css"),
        scripts=scripts,
        hashes=[_source_hash(script) for script in scripts],
        data=packed(page_data(contents)),
        specifications={name: json.loads(_text("pictures", f"{name}.json")) for name in PICTURES},
    )


def page_data(contents: Contents) -> dict[str, Any]:
    """What the page's script needs, once."""
    first = contents.grids[0]
    labels = [grid.label for grid in contents.grids if grid.label is not None]
    return {
        "run": contents.manifest.run,
        "model": contents.manifest.model.name,
        "scales": None if contents.path is None else str(contents.path),
        "layers": list(first.layers),
        "sites": list(first.sites),
        "measures": [{"key": key, "name": name, "meaning": meaning} for key, name, meaning in measures(contents.grids)],
        "labels": labels,
        "ratios": shorts(first.outlier_ratio.ravel()),
        "grids": [
            {name: shorts(grid.values(name).ravel()) for name in (CLIPPED_SHARE, SQNR, PREDICTED_KL)}
            for grid in contents.grids
            if grid.label is not None
        ],
        "strategies": [
            [one.label, [[layer, site, short(loss.sqnr_db)] for (layer, site), loss in one.sites.items()]]
            for one in contents.strategies
        ],
        "pages": contents.pages,
        "evaluation": _evaluation(contents),
        "decoding": [_decoded(rows) for rows in contents.by_tokens.values()],
        "convergence": _convergence(contents),
    }


def measures(grids: list[SiteGrid]) -> list[tuple[str, str, str]]:
    """Those of MEASURES of which there is a number."""
    return [one for one in MEASURES if any(not math.isnan(value) for value in grids[0].values(one[0]).ravel())]


def _first_measure(grid: SiteGrid) -> str:
    """The key of the measure that the heat map shows at first."""
    return next((key for key, _, _ in measures([grid])), OUTLIER_RATIO)


def worst_layers(grid: SiteGrid) -> dict[str, int]:
    """Each site's layer that hurts most, by the first measure; of a site without a number the first that has it."""
    values = grid.values(_first_measure(grid))
    found = {}
    for column, site in enumerate(grid.sites):
        known = [(value, -row) for row, value in enumerate(values[:, column]) if not math.isnan(value)]
        found[site] = grid.layers[-max(known)[1]] if known else _first_layer(grid, column)
    return found


def _first_layer(grid: SiteGrid, column: int) -> int:
    """The first layer that has the site: the head's sites are of the head alone."""
    known = zip(grid.layers, grid.outlier_ratio[:, column], strict=True)
    return next((layer for layer, ratio in known if not math.isnan(ratio)), grid.layers[0])


def _cells(grid: SiteGrid) -> list[list[str]]:
    """The numbers of the first measure, as the heat map has them before its script runs."""
    name = _first_measure(grid)
    form = FORMS[name]
    return [[form(value) for value in row] for row in grid.values(name).tolist()]


def _self_generated(contents: Contents) -> set[str]:
    tasks = [] if contents.evaluation is None else contents.evaluation.about["tasks"]
    return {str(task["data"]) for task in tasks if task.get("self_generated")}


def _selected(contents: Contents) -> list[dict[str, Any]]:
    """The selected row of each site as a whole, in the order of the table; those of parts are in the page's data."""
    rows = [] if contents.rows is None else contents.rows.to_pylist()
    return [row for row in rows if row["selected"] and row["group_name"] == WHOLE]


def _evaluation(contents: Contents) -> list[dict[str, Any]]:
    """Each text's strategies that have a KL, with its interval."""
    texts = [] if contents.summary is None else evaluated_texts(contents.summary)
    return [
        {
            "text": f"{text.data}, {text.task}",
            "rows": [
                {
                    "strategy": row.strategy,
                    "kl": _thousandths(row.kl.value),
                    "low": _thousandths(row.kl.low),
                    "high": _thousandths(row.kl.high),
                    "verdict": row.verdict or "",
                }
                for row in text.strategies
                if row.strategy != FLOAT and row.kl is not None
            ],
        }
        for text in texts
    ]


def _decoding(contents: Contents) -> dict[str, Any] | None:
    """What the page says of an evaluation by decoding; None where there is none."""
    if contents.decoded is None:
        return None
    number = contents.decoded.id
    texts = [
        {"data": data, "sentences": sentences(rows), "rows": table(rows)} for data, rows in contents.by_tokens.items()
    ]
    command = f"quambase plot decoding --evaluation {number} --columns 2{of_database(contents.db)}"
    return {"evaluation": number, "texts": texts, "command": command}


def _decoded(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """KL x1000 of a text against tokens decoded: of each strategy, and of each strategy's prefill once."""
    decoded, before = [], {}
    for row in rows:
        if row["decoded_from"]:  # not of all predictions, nor of the prompt's own
            base, to = base_of(row["strategy"]), row["decoded_to"]
            ends = {"kl": "kl", "low": "kl_low", "high": "kl_high"}
            figures = {name: _thousandths(row[column]) for name, column in ends.items()}
            decoded.append({"strategy": row["strategy"], "to": to} | figures)
            before[base, to] = {"strategy": base, "to": to, "kl": _thousandths(row["prefill_kl"])}
    return {"decoded": decoded, "prefill": list(before.values())}


def _thousandths(value: float | None) -> float | None:
    """`short` of a number times 1,000."""
    return short(None if value is None else 1000 * value)


def _positions(contents: Contents) -> dict[str, Any] | None:
    """What the page says of positions: each site in the layer where its ends differ most, those that differ most first.
    None where the run was not collected by position.
    """
    most: dict[str, Positions] = {}
    for found in contents.positions.values():
        if found.site not in most or found.unequal > most[found.site].unequal:
            most[found.site] = found
    if not most:
        return None
    ordered = sorted(most.values(), key=lambda found: -found.unequal)
    rows = []
    for found in ordered:
        buckets = found.rows.to_pylist()
        ends = [(tokens(row), row["q9999"]) for row in (buckets[0], buckets[-1])]
        rows.append({"layer": found.layer, "site": found.site, "ends": ends, "change": found.change})
    worst = ordered[0]
    command = f"quambase plot positions --site {shlex.quote(worst.site)} --layer {worst.layer}"
    command += f" --run {contents.manifest.run}{of_database(contents.db)}"
    return {"words": worst.words(), "rows": rows, "command": command}


def _convergence(contents: Contents) -> list[dict[str, Any]] | None:
    if contents.convergence is None:
        return None
    columns = ("strategy", "documents", "change", "change_low", "change_high")
    rows = contents.convergence.sizes.select(columns).to_pylist()
    return [{key: short(value) if key.startswith("change") else value for key, value in row.items()} for row in rows]


def packed(data: dict[str, Any]) -> str:
    """JSON, compressed, in base64: letters that no HTML reads otherwise."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "backslashreplace"), 9, mtime=0)).decode()


def anchor(site: str, layer: int) -> str:
    """The link to a site's page."""
    return f"#layer-{layer}/{quote(site, safe=':', errors='replace')}"


def number(value: float | None) -> str:
    """Three significant digits; a dash where there is no number."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e15 else f"{value:.3g}"


def share(value: float | None) -> str:
    """A share of one, in % or, under 0.1 %, in ppm."""
    if value is None or math.isnan(value):
        return "–"
    return f"{number(1e6 * value)} ppm" if 0 < abs(value) < 0.001 else f"{number(100 * value)} %"


def thousandths(value: float | None) -> str:
    """A number times 1,000."""
    return number(None if value is None else 1000 * value)


FORMS = {OUTLIER_RATIO: number, CLIPPED_SHARE: share, SQNR: number, PREDICTED_KL: thousandths}
"""How people read a measure."""


def _vega_version() -> str:
    """As vendored/README.md has it."""
    rows = [line.split("|") for line in _text("vendored", "README.md").splitlines()]
    return next(row[3].strip() for row in rows if len(row) > 3 and row[1].strip() == "vega.min.js")


def _source_hash(script: str) -> str:
    """As a content security policy names an inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _text(folder: str, name: str) -> str:
    return (files("quambase.report") / folder / name).read_text(encoding="utf-8")
