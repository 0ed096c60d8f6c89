"""Per-document results as other tools log them: lm-eval's ``samples_*.jsonl``, one JSON object a line. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quambase.schema.errors import DataInvalid

HASHES = ("doc_hash", "prompt_hash", "target_hash")
"""What tells that two rows are about the same document, asked the same question, with the same answer expected."""

_ABOUT = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", *HASHES}
"""Keys of a row that are no metric."""

NO_FILTER = "none"
"""lm-eval's name for answers that are scored as they are."""

EXPECTED = "expected lm-eval's samples_*.jsonl (--log_samples), one JSON object a line"

LONGEST_NAME = 60

Value = float | tuple[float, float]
"""A metric of one document: a number, or one and its weight, such as a log-likelihood and the words it is of."""


@dataclass(frozen=True)
class Sample:
    """One document's results by one filter.

    document  its number in the data set, as text
    hashes    HASHES, None where the log lacks one
    content   SHA-256 of the document itself, None where the log lacks it
    values    by metric; None where that is no number
    """

    document: str
    filter: str
    hashes: tuple[str, ...] | None
    content: str | None
    values: dict[str, Value | None]


@dataclass(frozen=True)
class SampleLog:
    """A log: the name of its task, as its file says, and its samples in the order of the file."""

    path: Path
    task: str
    samples: list[Sample] = field(repr=False)

    @property
    def filters(self) -> list[str]:
        """Filters in the order in which they occur."""
        return list(dict.fromkeys(sample.filter for sample in self.samples))

    @property
    def hashed(self) -> bool:
        """Whether every sample has its hashes."""
        return all(sample.hashes is not None for sample in self.samples)


def read_sample_log(path: Path) -> SampleLog:
    """Read a log. DataInvalid, in one line: what is wrong in which line of it."""
    if not path.is_file():
        raise DataInvalid(f"{path} is {'a folder' if path.is_dir() else 'not a file'}; {EXPECTED}")
    samples = [_sample(path, number, row) for number, row in _rows(path)]
    if not samples:
        raise DataInvalid(f"{path} holds no samples; {EXPECTED}")
    twice, times = Counter((sample.document, sample.filter) for sample in samples).most_common(1)[0]
    if times > 1:
        raise DataInvalid(
            f"{path} has document {_short(twice[0])} {times} times with filter {_short(twice[1])}; expected one line "
            "for each document and filter: is it several logs in one file?"
        )
    found = re.fullmatch(r"samples_(.+?)(_\d{4}-\d\d-\d\dT[\d.:-]+)?\.jsonl", path.name)
    return SampleLog(path, found[1] if found else path.name, samples)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file, with their line numbers from 1; empty lines are skipped."""
    # A whole number may have any number of digits, a float has no limit of them.
    decode = json.JSONDecoder(parse_int=float).decode
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                row = decode(line) if line.strip() else None
            except UnicodeDecodeError as error:
                raise DataInvalid(f"{path} is not UTF-8 text ({error.reason} in line {number}); {EXPECTED}") from None
            except RecursionError:
                raise _too_deep(path, number) from None
            except json.JSONDecodeError as error:
                raise DataInvalid(f"{path} is no JSON in line {number} ({error.msg}); {EXPECTED}") from None
            if row is None:
                if line.strip():
                    raise DataInvalid(f"{path} holds null in line {number}; {EXPECTED}")
                continue
            if not isinstance(row, dict):
                raise DataInvalid(f"{path} holds no JSON object in line {number}; {EXPECTED}")
            yield number, row


def _sample(path: Path, number: int, row: dict[str, Any]) -> Sample:
    document, label = row.get("doc_id"), row.get("filter", NO_FILTER)
    if isinstance(document, bool) or not isinstance(document, str | float):
        raise DataInvalid(f"{path} has no doc_id (a number or a text) in line {number}; {EXPECTED}")
    if not isinstance(label, str):
        raise DataInvalid(f"{path} has a filter that is no text in line {number}; {EXPECTED}")
    hashes = tuple(row.get(name) for name in HASHES)
    try:
        content = None if row.get("doc") is None else _digest(row["doc"])
    except RecursionError:
        raise _too_deep(path, number) from None
    named = row.get("metrics")
    metrics = named if isinstance(named, list) else [name for name in row if name not in _ABOUT]
    return Sample(
        document if isinstance(document, str) else f"{document:.17g}",
        label,
        tuple(map(str, hashes)) if all(isinstance(one, str) for one in hashes) else None,
        content,
        {name: _value(row.get(name)) for name in metrics if isinstance(name, str)},
    )


def _too_deep(path: Path, number: int) -> DataInvalid:
    return DataInvalid(f"{path} is nested too deep in line {number}; {EXPECTED}")


def _digest(document: object) -> str:
    """SHA-256 of a document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _value(value: object) -> Value | None:
    """A metric's value; None for what is no number. A list of answers, right or wrong, is their sum and number."""
    if isinstance(value, bool | float):
        return float(value)
    if isinstance(value, list) and value:
        if all(isinstance(one, bool) for one in value):
            return float(sum(value)), float(len(value))
        if len(value) == 2 and all(isinstance(one, float) for one in value):
            return value[0], value[1]
    return None


def paired_samples(a: SampleLog, b: SampleLog, label: str) -> list[tuple[Sample, Sample]]:
    """The samples of both logs by one filter, in pairs of one document, in A's order.

    They are paired by their hashes; where a log lacks them, by number and by what the document is. Equal documents are
    paired in the order of their numbers. DataInvalid: the logs are not about the same documents, or cannot tell.
    """
    hashed = a.hashed and b.hashed
    mine, theirs = (_keyed(log, label, hashed=hashed) for log in (a, b))
    if mine.keys() != theirs.keys():
        raise DataInvalid(_why_different(a, b, label, mine, theirs, hashed=hashed))
    return [(mine[key], theirs[key]) for key in mine]


def _keyed(log: SampleLog, label: str, *, hashed: bool) -> dict[tuple[object, ...], Sample]:
    """The samples of one filter by what identifies them; of equal documents the k-th has the number k."""
    samples = [sample for sample in log.samples if sample.filter == label]
    found: dict[tuple[object, ...], Sample] = {}
    seen: Counter[tuple[object, ...]] = Counter()
    for sample in sorted(samples, key=_number) if hashed else samples:
        if hashed:
            assert sample.hashes is not None
            key: tuple[object, ...] = sample.hashes
        elif sample.content is None:
            raise DataInvalid(
                f"{log.path} has neither hashes ({', '.join(HASHES)}) nor a doc for document "
                f"{_short(sample.document)}, so nothing tells whether documents are the same; log samples with doc"
            )
        else:
            key = sample.document, sample.content
        found[*key, seen[key]] = sample
        seen[key] += 1
    order = {id(sample): place for place, sample in enumerate(samples)}
    return dict(sorted(found.items(), key=lambda item: order[id(item[1])]))


def _number(sample: Sample) -> tuple[float, str]:
    try:
        return float(sample.document), sample.document
    except ValueError:
        return 0.0, sample.document


def _why_different(
    a: SampleLog,
    b: SampleLog,
    label: str,
    mine: dict[tuple[object, ...], Sample],
    theirs: dict[tuple[object, ...], Sample],
    *,
    hashed: bool,
) -> str:
    """Why two logs cannot be paired, in one line."""
    only_a, only_b = len(mine.keys() - theirs.keys()), len(theirs.keys() - mine.keys())
    filtered = "" if label == NO_FILTER else f" with filter {_short(label)}"
    what = (
        f"{a.path} (A) and {b.path} (B) are not about the same documents{filtered}: "
        f"{only_a:,} of {len(mine):,} are only in A, {only_b:,} of {len(theirs):,} only in B"
    )
    if not hashed:
        numbers_a, numbers_b = ({sample.document for sample in one.values()} for one in (mine, theirs))
        if numbers_a == numbers_b:
            return (
                f"{what}; their numbers (doc_id) are the same, their content (doc) is not: compare runs on one data set"
            )
        return f"{what}; compare runs on the same documents (no --limit, or the same)"
    differs = [
        name
        for place, name in enumerate(HASHES)
        if Counter(key[place] for key in mine) != Counter(key[place] for key in theirs)
    ]
    if "doc_hash" in differs:
        return f"{what}; compare runs on the same documents (no --limit, or the same)"
    advice = "examples and chat template" if "prompt_hash" in differs else "version of the task"
    differing = " and ".join(differs) or "prompts and targets"
    return f"{what}; the documents are the same, but their {differing} differ: compare runs with the same {advice}"


def _short(text: str) -> str:
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return shown if len(shown) <= LONGEST_NAME else f"{shown[: LONGEST_NAME - 1]}…"
