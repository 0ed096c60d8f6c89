"""The one run, site and scale group that a command looks at."""

from __future__ import annotations

from quambase.analyzer.scale_groups import ScaleGroup, scale_groups_by_layer
from quambase.schema.errors import UnknownName
from quambase.schema.groups import GROUP
from quambase.schema.sites import WHOLE
from quambase.schema.sql.database import StatsDB
from quambase.schema.stored.manifest import Manifest


def one_run(database: StatsDB, command: str) -> Manifest:
    """The run that is opened; UnknownName if there are several. ``command``: its name in that message."""
    if len(database.runs) != 1:
        raise UnknownName(f"{len(database.runs)} runs were chosen; {command} looks at one: name it with --run")
    return database.runs[0]


def chosen_site(database: StatsDB, site: str | None, layer: int | None) -> tuple[int, str]:
    """(layer, site) of the largest outlier ratio among those that are asked for. UnknownName: there is none."""
    candidates = database.stats(site, layer, limit=1).to_pylist()
    if not candidates:
        run = database.runs[0].run
        raise UnknownName(f"run {run} holds no site '{site}' in layer {layer}; see `quambase stats`")
    return int(candidates[0]["layer"]), str(candidates[0]["site"])


def chosen_group(database: StatsDB, site: str | None, layer: int | None, group: str = WHOLE) -> ScaleGroup:
    """The scale group ``group`` of `chosen_site` of the one run opened. UnknownName: the site has no such group."""
    (manifest,) = database.runs
    layer, site = chosen_site(database, site, layer)
    (of_layer,) = scale_groups_by_layer(database, manifest.run, GROUP, [layer])
    found = {each.group_name: each for each in of_layer if each.site == site}
    if group not in found:
        raise UnknownName.of(f"group of {site}", group, found, where=f"run {manifest.run}")
    return found[group]


def place(layer: int, site: str, group: str = WHOLE) -> str:
    """A scale group in words: ``layer 3 x_proj:output, group B``."""
    return f"layer {layer} {site}" + ("" if group == WHOLE else f", group {group}")
