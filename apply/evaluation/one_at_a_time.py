"""What each scale costs by itself: the KL of a model of which one site is quantized and everything else is not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from quambase.apply.apply import load_source
from quambase.apply.evaluation.likelihood import compare, log_probabilities
from quambase.apply.evaluation.scoring import Item
from quambase.apply.evaluation.tasks import read_tasks
from quambase.apply.int8.arithmetic import decoded, encoded
from quambase.apply.int8.build import prepared_for
from quambase.apply.int8.group_scales import channel_maps, scale_of_channels, zero_point_of_channels
from quambase.model.language_model import LanguageModel, floating_model
from quambase.model.operators.choice import choose_device
from quambase.model.packed_batch import Batch
from quambase.schema.files import local_folder
from quambase.schema.progress import Progress, Shown
from quambase.schema.scale_table import Scale, ScaleTable, read_scales
from quambase.schema.sites import find_site
from quambase.schema.sql.answer import PrintsAsTable
from quambase.schema.stored.results import PERPLEXITY, WINDOW

DOCUMENTS = 8
"""Documents unless told otherwise: every scale is a forward pass over each of them."""

CHUNK = 512
"""Tokens whose logits are computed at a time."""

REFERENCE_CELLS = 1 << 27
"""Logits of the undisturbed model that stay in memory, 0.5 GB, since every scale is compared with them."""

ALONE = pa.schema(
    [
        pa.field("layer", pa.int32()),
        pa.field("site", pa.string()),
        pa.field("strategy", pa.string()),
        pa.field("predicted_kl", pa.float64()),
        pa.field("measured_kl", pa.float64()),
        pa.field("mse", pa.float64()),
    ]
)
"""A row for each site and strategy: KL in nats a token, predicted (null: not known) and measured on the documents; the
mean squared error of the site's values, over the calibration texts.
"""


@dataclass(frozen=True, repr=False)
class Alone(PrintsAsTable):
    """What `one_at_a_time` measured: rows of ALONE, largest measured KL first; a sentence each; notes."""

    table: pa.Table
    summary: list[str]
    notes: list[str]

    def shown(self) -> pa.Table:
        """Every row."""
        return self.table


def one_at_a_time(
    scales: str | Path,
    strategies: Sequence[str] = ("all",),
    *,
    data: str | Path | None = None,
    samples: int | None = None,
    window: int = WINDOW,
    db: str | Path = Path("quambase-db"),
    model: str | Path | None = None,
    device: str = "auto",
    progress: Shown = False,
) -> Alone:
    """Quantize one site after another of the floating-point model, by each strategy of a scale table, everything else
    left as it is, and measure the KL to the undisturbed model over the predicted tokens of some documents.

    Only sites that act in a forward pass; one scale for each site as finely as the table divides it. Weights are not
    quantized. The parameters as of `quambase.apply.evaluation.evaluate.evaluate`; ``samples`` is 8 unless given.
    Errors: ScalesInvalid, UnknownName, CheckpointInvalid, ModelNotFound, DataInvalid.
    """
    db, where = local_folder(db), choose_device(device)
    with Progress(progress) as shown:
        shown.say("loading the model")
        table = read_scales(Path(scales))
        source = load_source(table, None if model is None else str(model))
        texts = [] if data is None else [str(data)]
        tasks, notes = read_tasks(PERPLEXITY, texts, source, samples or DOCUMENTS, window, db, table.run)
        undisturbed = floating_model(prepared_for(source.any_weights, table), where, rotated=True)
        measurement, stored = _Measurement(undisturbed, tasks[0].items, table), _stored_figures(table)
        asked = list(_cases(table, strategies))
        shown.start("one at a time", len(asked), len(asked), unit="scales")
        rows: list[dict[str, Any]] = []
        for layer, site, label, scale in asked:
            with shown.piece(1, 1, f"layer {layer} {site}"):
                measured = {"measured_kl": measurement.kl(layer, site, scale)}
                rows.append({"layer": layer, "site": site, "strategy": label} | measured | stored[layer, site, label])
    rows.sort(key=lambda row: -row["measured_kl"])
    found = pa.Table.from_pylist(rows, schema=ALONE)
    return Alone(found, _summary(found), [f"{tasks[0].data}: {len(tasks[0].items)} documents", *notes])


def _cases(table: ScaleTable, strategies: Sequence[str]) -> Iterator[tuple[int, str, str, Scale]]:
    """(layer, site, label, scale) of every scale that acts in a forward pass. UnknownName: no such label."""
    labels = table.labels() if "all" in strategies else list(dict.fromkeys(strategies))
    family = table.model.family
    for label in labels:
        for (layer, site), scale in table.group_scales_for(label).items():
            about = find_site(site, family)
            if about.acts and not about.head:
                yield layer, site, label, scale


def _stored_figures(table: ScaleTable) -> dict[tuple[int, str, str], dict[str, float | None]]:
    """The predicted KL and the mean squared error of each (layer, site, label): sum and mean over its scale groups."""
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    names = ["layer", "site", "label", "count", "mse", "predicted_kl"]
    for row in table.table.filter(table.table["consumed"]).select(names).to_pylist():
        groups.setdefault((row["layer"], row["site"], row["label"]), []).append(row)
    return {key: _together(rows) for key, rows in groups.items()}


def _together(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    kl = [row["predicted_kl"] for row in rows]
    count = sum(row["count"] for row in rows)
    return {
        "predicted_kl": None if None in kl else math.fsum(kl),
        "mse": math.fsum(row["mse"] * row["count"] for row in rows) / count if count else None,
    }


class _Measurement:
    """The undisturbed model on the documents, with which others are compared."""

    def __init__(self, model: LanguageModel, items: Sequence[Item], table: ScaleTable) -> None:
        self.model, self.config = model, model.config
        self.divisions = channel_maps(table.model.layer_groups or ()) or [[] for _ in range(model.config.n_layer)]
        sequences = [sequence for item in items for sequence in item.sequences]
        self.batch = Batch.pack(sequences)
        ends = self.batch.offsets[1:] - 1
        predicted = torch.ones(len(self.batch.tokens), dtype=torch.bool)
        predicted[ends] = False  # a sequence's last token predicts nothing
        self.rows = torch.nonzero(predicted)[:, 0]
        self.targets = self.batch.tokens[self.rows + 1].to(model.device)
        self.undisturbed = self.model.hidden(self.batch)
        self._references: dict[int, torch.Tensor] = {}

    def kl(self, layer: int, site: str, scale: Scale) -> float:
        """KL to the undisturbed model, nats a predicted token, with this one site quantized."""
        where = self.config, self.divisions[layer], site, scale
        steps, zero = (f(*where).to(self.model.device) for f in (scale_of_channels, zero_point_of_channels))

        def change(index: int, name: str, values: torch.Tensor) -> torch.Tensor:
            if (index, name) != (layer, site):
                return values
            return decoded(encoded(values, steps, zero), steps, zero).to(values.dtype)

        disturbed = self.model.hidden(self.batch, change=change)
        total = 0.0
        chunks = zip(torch.split(self.rows, CHUNK), torch.split(self.targets, CHUNK), strict=True)
        for number, (rows, targets) in enumerate(chunks):
            with torch.inference_mode():
                reference = self._reference(number, rows)
                total += float(compare(reference, self.model.logits(disturbed[rows]), targets)[1].sum())
        return total / max(1, len(self.rows))

    def _reference(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        """log p (rows, v) of the undisturbed model; the first chunks' stay in memory."""
        found = self._references.get(number)
        if found is None:
            found, _ = log_probabilities(self.model.logits(self.undisturbed[rows]))
            if (number + 1) * found.numel() <= REFERENCE_CELLS:
                self._references[number] = found
        return found


def rank_correlation(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """Spearman's: the correlation of ranks, ties sharing their mean rank; NaN where either does not vary."""

    def ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        found: npt.NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[place]
        return found

    one, other = ranks(x), ranks(y)
    if one.size < 2 or one.std() == 0 or other.std() == 0:
        return math.nan
    return float(np.corrcoef(one, other)[0, 1])


def _summary(table: pa.Table) -> list[str]:
    """How well the prediction orders scales, beside plain squared error; and what measures worst."""
    rows = table.to_pylist()
    lines = []
    known = [row for row in rows if row["predicted_kl"] is not None]
    if known:
        measured, predicted, mse = (
            np.array([row[name] for row in known], np.float64) for name in ("measured_kl", "predicted_kl", "mse")
        )
        lines.append(
            f"predicted against measured KL of {len(known)} scales, each alone: rank correlation "
            f"{rank_correlation(predicted, measured):.3f}; of plain squared error {rank_correlation(mse, measured):.3f}"
        )
        ratio = measured[predicted > 0] / predicted[predicted > 0]
        if ratio.size:
            low, middle, high = np.quantile(ratio, [0.05, 0.5, 0.95])
            lines.append(f"measured over predicted: {middle:.2f} (median), {low:.2f} to {high:.2f} for 90 % of them")
    else:
        lines.append("the run has no sensitivities, so nothing is predicted: collect it with --sensitivity")
    by_label: Counter[str] = Counter()
    for row in rows:
        by_label[row["strategy"]] += row["measured_kl"]
    shown = ", ".join(f"{label} {total:.2g}" for label, total in sorted(by_label.items(), key=lambda item: item[1]))
    lines.append(f"sum over the sites, nats a token: {shown}")
    return lines


def picture(path: Path, table: pa.Table, title: str) -> None:
    """Save predicted against measured KL, a point for each scale, coloured by site; `save_picture`'s errors."""
    from quambase.schema.pictures import logarithmic, new_figure, picture_style, save_picture

    rows = [row for row in table.to_pylist() if row["predicted_kl"]]
    with picture_style():
        figure = new_figure(2, 4.5)
        axes = figure.subplots()
        axes.set_title(title)
        for site in dict.fromkeys(row["site"] for row in rows):
            points = [(row["predicted_kl"], row["measured_kl"]) for row in rows if row["site"] == site]
            axes.plot(*zip(*points, strict=True), ".", markersize=4, label=site)
        if rows:
            low, high = (f(r[k] for r in rows for k in ("predicted_kl", "measured_kl")) for f in (min, max))
            axes.plot([low, high], [low, high], color="0.6", linewidth=1, zorder=0)
            logarithmic(axes, "x", "y")
            figure.legend(loc="outside right upper")
        axes.set_xlabel("predicted KL, nats a token")
        axes.set_ylabel("measured KL of the site alone, nats a token")
    save_picture(figure, path)
