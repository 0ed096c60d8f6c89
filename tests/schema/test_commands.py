"""The command that made a run, told from its manifest, against the parser of `collect` itself."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fabricate import make_run

from quambase.cli.collect import collect
from quambase.schema.commands import collect_command
from quambase.schema.sites import FAMILIES, MAMBA1, MAMBA2, SAMPLED_STATE_SITES
from quambase.schema.stored.manifest import Manifest

EVERY = [site.name for site in FAMILIES[MAMBA1] if not site.sampled]

ASKED: list[dict[str, Any]] = [
    {"samples": 64, "block": 32, "seq_len": 512, "sites": EVERY},
    {"samples": 7, "block": 4, "seq_len": 128, "sites": EVERY[2:4], "by_block": True, "seed": 3, "keep_tokens": "all"},
    {"samples": 512, "block": 32, "seq_len": 512, "sites": EVERY, "sensitivity": {"documents": 40, "tokens": 9}},
    {"samples": 8, "block": 32, "seq_len": 512, "sites": [*EVERY, *SAMPLED_STATE_SITES], "state_every": 16},
    {"samples": 8, "block": 32, "seq_len": 512, "sites": EVERY[:1], "by_position": True},
    {"samples": 8, "block": 32, "seq_len": 512, "sites": [EVERY[0], *SAMPLED_STATE_SITES], "state_every": 1},
]


def parsed(command: str) -> dict[str, Any]:
    words = shlex.split(command)
    assert words[:2] == ["quambase", "collect"]
    return collect.make_context("collect", words[2:]).params


@pytest.mark.parametrize("identity", ASKED)
def test_the_command_asks_for_what_the_run_has(identity: dict[str, Any], tmp_path: Path) -> None:
    made = Manifest.load(make_run(tmp_path))
    manifest = replace(made, identity=identity, model=replace(made.model, path="a folder/with 'quotes'"))
    found = parsed(collect_command(manifest))
    assert found["model"] == "a folder/with 'quotes'" and found["data"] == "random"
    assert (found["samples"], found["batch_size"]) == (identity["samples"], identity["block"])
    assert found["seq_len"] == identity["seq_len"] and found["by_block"] == identity.get("by_block", False)
    assert list(found["sites"] or EVERY) == [site for site in identity["sites"] if site not in SAMPLED_STATE_SITES]
    assert found["by_position"] == identity.get("by_position", False)
    assert found["state_every"] == identity.get("state_every")
    assert found["seed"] == identity.get("seed", 0) and found["keep_tokens"] == identity.get("keep_tokens", "64")
    assert found["sensitivity"] == identity.get("sensitivity", {}).get("documents")


def test_what_is_given_takes_the_place(tmp_path: Path) -> None:
    manifest = replace(Manifest.load(make_run(tmp_path)), identity=ASKED[0])
    found = parsed(collect_command(manifest, samples=128, data="x.jsonl", batch_size=8, by_block=True))
    assert (found["samples"], found["data"], found["batch_size"], found["by_block"]) == (128, "x.jsonl", 8, True)


@pytest.mark.parametrize(
    ("groups", "asked"),
    [
        (None, ("none", None)),
        ({"variant": "fixed", "documents": 15}, (None, None)),
        ({"variant": "quamba2", "documents": 15}, ("quamba2", None)),
        ({"variant": "fixed", "run": "run-b"}, (None, "run-b")),
    ],
)
def test_a_mamba2_is_sorted_as_it_was(
    groups: dict[str, Any] | None, asked: tuple[str | None, str | None], tmp_path: Path
) -> None:
    made = Manifest.load(make_run(tmp_path))
    identity = {"samples": 4} | ({"groups": groups} if groups else {})
    found = parsed(collect_command(replace(made, identity=identity, model=replace(made.model, family=MAMBA2))))
    assert (found["groups"], found["groups_from"]) == asked
