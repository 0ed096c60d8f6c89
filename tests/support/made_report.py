"""A database with everything that a report shows, made by hand, with names and tokens that try to break the page."""

from __future__ import annotations

import base64
import gzip
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fabricate import make_run, random_activations

from quambase.analyzer.analyze import analyze
from quambase.schema.checksums import file_sha256
from quambase.schema.stored.manifest import Manifest, TableFile
from quambase.schema.stored.results import EVALUATION, RESULTS_FILE
from quambase.schema.tables import OUTLIERS, RESULTS, write_table

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><!--'\"&"
"""A name, or the text of a token."""

TOKENS = (HOSTILE, "\u202egnp.exe\u2066", "\n", "</ScRiPt >", "{{ 7 * 7 }}", "', alert(1), '", "\x00\x07")

LABELS = ("absmax", "percentile", "mse", "effect", "effect_affine", "quamba", "outlier_piecewise")

DOCUMENTS = 12


def make_database(
    folder: Path, *, name: str = HOSTILE, scales: bool = True, evaluation: bool = True, along: bool = False
) -> Path:
    """A database of the run `run-a`, whose model is called ``name``, with its scale table and an evaluation. ``along``:
    counted by position, too, and with an older evaluation by decoding.
    """
    run = make_run(folder, activations=random_activations(3), sensitive=True, by_position=along, name=name)
    _add_tokens(run)
    if scales:
        analyze(folder, strategies=LABELS, out=folder / "scales.parquet")
    if evaluation:
        _evaluate(folder)
    if along:
        add_decoding(folder)
    return folder


def _add_tokens(run: Path) -> None:
    """Put TOKENS into the table of largest values, at layer 0 x_proj:input; farther values in the next layer."""
    rows = [
        {"run": "run-a", "layer": layer, "site": "x_proj:input", "group_name": "all"}
        | {"document": 0, "position": i, "token_id": i, "token": token, "channel": i % 6, "value": first - i}
        | ({"before": "one two ", "after": f" {HOSTILE}"} if i == 1 else {"before": None, "after": None})
        for layer, first in ((0, 90.0), (1, 190.0))
        for i, token in enumerate(TOKENS)
    ]
    path = run / "outliers.parquet"
    write_table(path, "outliers", pa.Table.from_pylist(rows, schema=OUTLIERS), OUTLIERS)
    manifest = Manifest.load(run)
    tables = manifest.tables | {path.name: TableFile(len(rows), file_sha256(path))}
    replace(manifest, tables=tables, identity=manifest.identity | {"block": 32, "seq_len": 512}).save(run)


def _evaluate(database: Path) -> None:
    """An evaluation of the run on one text, in which `mse` is best and `quamba` has the most KL."""
    random = np.random.default_rng(2)
    folder = database / "results" / "0123456789abcdef"
    folder.mkdir(parents=True)
    nll = random.gamma(5.0, 20.0, DOCUMENTS)
    empty = dict.fromkeys(RESULTS.names)
    rows = []
    for label, kl in (("float", 0.0), ("mse", 0.02), ("absmax", 0.05), ("quamba", 0.09)):
        noise = random.gamma(9.0, 1 / 9.0, DOCUMENTS)
        for i in range(DOCUMENTS):
            mine = {"evaluation": folder.name, "model": "m", "scales": "scales.parquet", "strategy": label}
            text = {"task": "perplexity", "data": HOSTILE, "document": i, "sha256": f"{i:064x}", "tokens": 50}
            found = {"nll": nll[i] + 50 * kl * noise[i], "kl": 50 * kl * noise[i]}
            agree = {"top1_agreement": 50.0 - 100 * kl, "top1_right": 20.0}
            rows.append(
                empty | mine | text | found | {k: RESULTS.field(k).type.to_pandas_dtype()(v) for k, v in agree.items()}
            )
    tasks: list[dict[str, Any]] = [{"task": "perplexity", "data": HOSTILE, "documents": DOCUMENTS}]
    _store(folder, rows, ["mse", "absmax", "quamba"], tasks, number=1)


DECODED = ((0, 0), (1, 8), (9, 16))
"""Buckets of tokens decoded."""


def add_decoding(database: Path, number: int = 0) -> None:
    """An evaluation by decoding of two strategies, one also with the state in a format that loses nothing."""
    random = np.random.default_rng(4)
    folder = database / "results" / f"decoded{number:09}"
    folder.mkdir(parents=True)
    empty = dict.fromkeys(RESULTS.names)
    rows = []
    for task, label, kl, growth in (
        ("decode", "mse", 0.02, 2.0),
        ("decode", "quamba", 0.04, 1.1),
        ("decode", "mse, state int8:channel", 0.01, 1.0),
        ("prefill", "mse", 0.01, 1.0),
        ("prefill", "quamba", 0.03, 1.0),
        *((task, "float", 0.0, 1.0) for task in ("decode", "prefill")),
    ):
        for i in range(DOCUMENTS):
            positions = []
            for place, (low, high) in enumerate(DECODED):
                tokens, noise = high - low + 1, float(random.gamma(99.0, 1 / 99.0))
                lost = tokens * kl * growth**place * noise
                found = {"tokens": tokens, "nll": 3.0 * tokens + lost, "kl": lost, "top1_agreement": 0.9 * tokens}
                positions.append({"decoded_from": low, "decoded_to": high} | found)
            sums = {name: sum(p[name] for p in positions) for name in ("tokens", "nll", "kl", "top1_agreement")}
            mine = {"evaluation": folder.name, "model": "m", "scales": "scales.parquet", "strategy": label}
            text = {"task": task, "data": HOSTILE, "document": i, "sha256": f"{i:064x}"}
            rows.append(empty | mine | text | sums | {"top1_right": 5.0, "positions": positions})
    tasks: list[dict[str, Any]] = [
        {"task": task, "data": HOSTILE, "documents": DOCUMENTS, "prompt": 5} for task in ("decode", "prefill")
    ]
    _store(folder, rows, ["mse", "quamba", "mse, state int8:channel"], tasks, number=number)


def _store(
    folder: Path, rows: list[dict[str, Any]], strategies: list[str], tasks: list[dict[str, Any]], number: int
) -> None:
    pq.write_table(pa.Table.from_pylist(rows, RESULTS), folder / RESULTS_FILE)
    about = {
        "format_version": 1,
        "evaluation": folder.name,
        "model": "m",
        "scales": "scales.parquet",
        "run": "run-a",
        "strategies": strategies,
        "tasks": tasks,
        "notes": [],
        "number": number,
        "results_sha256": file_sha256(folder / RESULTS_FILE),
    }
    (folder / EVALUATION).write_text(json.dumps(about), encoding="utf-8")


class Page(HTMLParser):
    """A page taken apart.

    elements  (name, attributes) of each, in order
    texts     (name of the element, text), scripts and styles too
    """

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br", "link", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def words(self) -> str:
        """What a reader without JavaScript sees, spaces as one."""
        shown = "".join(text for name, text in self.texts if name not in ("script", "style"))
        return re.sub(r"\s+", " ", shown)

    @property
    def data(self) -> dict[str, Any]:
        """The data that the page carries."""
        found = re.search(r'<script type="application/octet-stream;base64" id="data">([^<]*)</script>', self.source)
        assert found
        opened: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(found[1])))
        return opened
