"""Commands to print: the one that made a run, from its manifest; and the option that names a database."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quambase.schema.sites import FAMILIES, MAMBA2, SAMPLED_STATE_SITES

if TYPE_CHECKING:  # every command imports this file, and few read a manifest
    from quambase.schema.stored.manifest import Manifest

BATCH, LENGTH, KEPT, SEED = 32, 512, 64, 0
"""What `collect` takes where nothing is said: documents per forward pass, tokens per document, tokens whose activations
are kept, the seed of their choice.
"""


DATABASE = Path("quambase-db")
"""The database of a command that names none."""


def of_database(db: Path | None) -> str:
    """The option that names ``db``, for a shell; empty where it is the default or None."""
    return "" if db is None or db == DATABASE else f" --db {shlex.quote(str(db))}"


def run_command(manifest: Manifest) -> str:
    """The command that made a run, for a shell: `quambase collect`, or `quambase import` of a saved tensor."""
    if manifest.model.family in FAMILIES:
        return collect_command(manifest)
    asked = manifest.identity
    words = ["quambase", "import", manifest.model.path or manifest.model.name, "--site", manifest.sites[0][1]]
    for option, value, default in (("--layer", asked.get("layer", 0), 0), ("--tensor", asked.get("tensor"), None)):
        words += [option, str(value)] if value != default else []
    return shlex.join(words)


def collect_command(
    manifest: Manifest,
    *,
    samples: int | None = None,
    data: str | None = None,
    batch_size: int | None = None,
    by_block: bool | None = None,
) -> str:
    """The `quambase collect` command of a run, for a shell; what is given takes the place of what the run has."""
    asked, text = manifest.identity, manifest.data
    words = ["quambase", "collect", "--model", manifest.model.path or manifest.model.name]
    words += ["--data", data or text.path or text.name, "--samples", str(samples or asked["samples"])]
    if by_block or (by_block is None and asked.get("by_block")):
        words.append("--by-block")
    if asked.get("by_position"):
        words.append("--by-position")
    if "state_every" in asked:
        words += ["--state-every", str(asked["state_every"])]
    for option, value, default in (
        ("--batch-size", batch_size or int(asked.get("block", BATCH)), BATCH),
        ("--seq-len", asked.get("seq_len", LENGTH), LENGTH),
        ("--keep-tokens", asked.get("keep_tokens", KEPT), KEPT),
        ("--seed", asked.get("seed", SEED), SEED),
    ):
        words += [option, str(value)] if value != default else []
    sites = [site for site in asked.get("sites", []) if site not in SAMPLED_STATE_SITES]
    if 0 < len(sites) < sum(not site.sampled for site in FAMILIES.get(manifest.model.family, ())):
        words += [word for site in sites for word in ("--site", site)]
    if manifest.model.family == MAMBA2:
        words += _grouping(asked.get("groups"))
    for option, name in (("--sensitivity", "sensitivity"), ("--second-moments", "second_moments")):
        words += [option, str(asked[name]["documents"])] if name in asked else []
    return shlex.join(words)


def _grouping(groups: dict[str, Any] | None) -> list[str]:
    """The options that sort a Mamba-2's heads and channels as the run has them."""
    if groups is None:
        return ["--groups", "none"]
    variant = str(groups.get("variant", "fixed"))
    found = ["--groups", variant] if variant != "fixed" else []
    return [*found, "--groups-from", str(groups["run"])] if "run" in groups else found
