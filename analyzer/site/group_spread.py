"""What sorting and clustering did to a Mamba-2's groups: how far each group reaches, before and after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from quambase.analyzer.site.channel_division import Division, divide
from quambase.analyzer.site.one_site import one_run, place
from quambase.schema.errors import DatabaseInvalid, UnknownName
from quambase.schema.files import refuse_foreign_picture
from quambase.schema.sql.database import StatsDB

SITE = "x_conv_out:input"
"""x, the input of the scan: the site whose channels are sorted."""


@dataclass(frozen=True)
class GroupSpread:
    """What `group_spread` found.

    run       its id
    table     a row per layer: groups, spread and mean step (`quambase.analyzer.site.channel_division.Division`), with
              heads and channels in the model's own order and as sorted, both divided into groups of the same sizes
    layer     the one drawn
    division  its channels and groups, before and after
    picture   the file saved, None if none was
    notes     which run it is, and what else a user should know
    """

    run: str
    table: pa.Table
    layer: int
    division: tuple[Division, Division]
    picture: Path | None
    notes: list[str]


def group_spread(
    db: str | Path = Path("quambase-db"),
    run: str | None = None,
    layer: int | None = None,
    picture: str | Path | None = None,
    force: bool = False,
) -> GroupSpread:
    """Compare the groups of a sorted run with the same division of the model's own order, from `channels` alone.

    layer    the one to draw; None: where sorting shortens the mean step most
    picture  file to save it to (its suffix says the format); None saves none
    force    replace ``picture`` even if it is no picture of quambase's

    UnknownName: several runs, no such layer; DatabaseInvalid: a run that was not sorted, or without the site;
    OutputRefused.
    """
    picture = None if picture is None else Path(picture)
    if picture is not None:
        refuse_foreign_picture(picture, force=force)
    with StatsDB(Path(db), run) as database:
        manifest = one_run(database, "groups")
        layers = manifest.model.layer_groups
        if layers is None:
            raise DatabaseInvalid(
                f"run {manifest.run} has no sorted groups; collect a Mamba-2 with --groups fixed or --groups quamba2"
            )
        rows = database.query("amax_of_every_channel", {"site": SITE})
    if rows.num_rows != len(layers) * len(layers[0].channel_index):
        raise DatabaseInvalid(f"run {manifest.run} lacks {SITE}; collect it with that site")
    amax = rows["amax"].to_numpy().reshape(len(layers), -1)
    divisions = [divide(groups, mine) for groups, mine in zip(layers, amax, strict=True)]
    table = pa.Table.from_pylist(
        [
            {
                "layer": number,
                "groups": len(after.sizes),
                "spread_before": before.spread,
                "spread_after": after.spread,
                "mean_step_before": before.mean_step,
                "mean_step_after": after.mean_step,
            }
            for number, (before, after) in enumerate(divisions)
        ]
    )
    if layer is None:
        gains = [after.mean_step / before.mean_step for before, after in divisions]
        layer = int(np.nanargmin(gains))
    if layer not in range(len(layers)):
        raise UnknownName.of("layer", str(layer), [str(number) for number in range(len(layers))])
    if picture is not None:
        from quambase.analyzer.pictures.groups import groups_figure  # matplotlib takes half a second to import
        from quambase.schema.pictures import save_picture

        save_picture(groups_figure(f"{place(layer, SITE)} of run {manifest.run}", *divisions[layer]), picture)
    return GroupSpread(manifest.run, table, layer, divisions[layer], picture, database.notes)
