"""Which operators to leave in 16 bit, so that the predicted loss of the others is least."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from quambase.analyzer.summary import acting
from quambase.schema.errors import DatabaseInvalid, DataInvalid
from quambase.schema.scale_table import Operator
from quambase.schema.sites import FAMILIES, OPERATORS, find_site

Losses = dict[int, dict[frozenset[str], float]]
"""By layer, and by the operators that read a site: the predicted KL of the sites that these read, nats a token."""


@dataclass(frozen=True)
class Mix:
    """Operators in 16 bit, and the predicted KL of all activations that other operators read, nats a token."""

    operators: tuple[Operator, ...]
    loss: float


def frontier(rows: Iterable[dict[str, Any]], family: str) -> list[Mix]:
    """The best choices of operators in 16 bit, none at first: each loses less than all choices of fewer operators.

    rows  one of tables.SCALES for each scale: those selected

    An operator in 16 bit reads 16-bit values, so a site's loss is gone if every operator that reads it is in 16 bit.
    The losses of sites add up (`predicted_loss`), and no site is read in two layers, so the best choice is a sum over
    the layers: for each layer the best sets of 0, 1, ... of its operators, joined layer by layer. Empty where a loss
    is not known.
    """
    losses = _losses(rows, family)
    if not losses:
        return []
    best = [Mix((), 0.0)]
    for layer, by_readers in sorted(losses.items()):
        best = list(_joined(best, list(_of_layer(layer, by_readers))))
    # A larger set that loses as much is no better.
    found: list[Mix] = []
    for mix in best:
        if not found or mix.loss < found[-1].loss:
            found.append(mix)
    return found


def choose(found: list[Mix], keep: int | None, budget: float | None) -> Mix:
    """The best choice of at most ``keep`` operators, or the smallest that loses no more than ``budget``, nats a token.

    DatabaseInvalid: the losses are not known. DataInvalid: there are not so many operators.
    """
    if not found:
        raise DatabaseInvalid(
            "which operators to keep in 16 bit is decided by their predicted effect, which needs sensitivities; "
            "collect the run again with --sensitivity"
        )
    if budget is not None:
        return next(mix for mix in found if mix.loss <= budget)
    assert keep is not None
    most = len(found[-1].operators)
    if keep > most:
        raise DataInvalid(f"--keep 16bit={keep}: with {most} operators in 16 bit nothing is lost; give {most} or fewer")
    return [mix for mix in found if len(mix.operators) <= keep][-1]


def _losses(rows: Iterable[dict[str, Any]], family: str) -> Losses:
    """Empty where one is not known, or the family has no operators."""
    found: Losses = {}
    if family not in FAMILIES:
        return {}
    for row in acting(rows):
        if row["predicted_kl"] is None:
            return {}
        readers = frozenset(find_site(row["site"], family).read_by)
        of_layer = found.setdefault(row["layer"], {})
        of_layer[readers] = of_layer.get(readers, 0.0) + row["predicted_kl"]
    return found


def _of_layer(layer: int, losses: dict[frozenset[str], float]) -> Iterator[Mix]:
    """The best sets of 0, 1, ... operators of one layer."""
    names = [name for name in OPERATORS if any(name in readers for readers in losses)]
    for count in range(len(names) + 1):
        sets = [frozenset(chosen) for chosen in itertools.combinations(names, count)]
        left = [math.fsum(loss for readers, loss in losses.items() if not readers <= chosen) for chosen in sets]
        least = min(range(len(sets)), key=left.__getitem__)
        yield Mix(tuple((layer, name) for name in names if name in sets[least]), left[least])


def _joined(before: list[Mix], layer: list[Mix]) -> Iterator[Mix]:
    """The best choices of 0, 1, ... operators of the layers before and this one."""
    for count in range(len(before) + len(layer) - 1):
        pairs = (
            (before[count - inside], layer[inside]) for inside in range(len(layer)) if 0 <= count - inside < len(before)
        )
        first, second = min(pairs, key=lambda pair: pair[0].loss + pair[1].loss)
        yield Mix(first.operators + second.operators, first.loss + second.loss)


def sentence(found: list[Mix], mix: Mix | None) -> str | None:
    """What ``mix`` of the choices ``found`` leaves in 16 bit and what that buys; or, without, where half is gained.
    None where nothing can be gained.
    """
    if len(found) < 2:
        return None
    whole, count = found[0].loss, len(found[-1].operators)
    if mix is None:
        half = next(each for each in found if each.loss <= whole / 2)
        few = len(half.operators)
        gone = f"half of the predicted loss would be gone with {few} of {count} operators in 16 bit"
        return f"{gone}: analyze --keep 16bit={few}"
    if not mix.operators:
        return f"no operator needs 16 bit: the predicted loss is {mix.loss:.2g} nats a token with all {count} in INT8"
    return (
        f"mixed leaves {len(mix.operators)} of {count} operators in 16 bit: predicted loss {mix.loss:.2g} nats a "
        f"token, {100 * (1 - mix.loss / whole):.0f} % less: {_in_words(mix.operators)}"
    )


def _in_words(operators: tuple[Operator, ...]) -> str:
    """By layer: ``layer 0 in_proj, conv_scan; layer 3 out_proj``."""
    by_layer: dict[int, list[str]] = {}
    for layer, name in operators:
        by_layer.setdefault(layer, []).append(name)
    return "; ".join(f"layer {layer} {', '.join(names)}" for layer, names in by_layer.items())
