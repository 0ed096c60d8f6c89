"""No damaged file of any kind ends in a traceback, a hang or a crash; and the harness finds such faults."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from fuzz_inputs import KINDS, make_input
from fuzz_json import change_json, parsed, text_of
from fuzz_judge import FINDINGS, HANG, MEMORY, OTHER, OUTCOMES, REFUSED, SAME, TRACEBACK, UNPRINTABLE, judge
from fuzz_planted import FAULTS, PLANTED, Unclear, planted
from fuzz_runner import Limits, run
from fuzz_seeds import make_seeds
from fuzz_targets import CHECKED, TARGETS

from quambase.schema.errors import DataInvalid

SEED = 20_261
INPUTS = 5_000
"""Inputs of all targets together, some hundreds each."""

PLANTED_SEED = 58
"""One whose first inputs meet every planted fault."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seeds(tmp_path_factory.mktemp("fuzz") / "seeds")


def test_no_reader_fails_on_a_damaged_file(made: Path) -> None:
    counts = run(made, [*TARGETS], INPUTS, SEED, jobs=2, limits=Limits(30.0))
    told = [
        f"{fault.outcome} of {fault.target}, python tests/fuzz --seed {SEED} --target '{fault.target}' --only "
        f"{fault.number}: {fault.where}\n{fault.story[-1500:]}"
        for (target, _, _), examples in counts.faults.items()
        for fault in examples[:1]
    ]
    assert not told, "\n\n".join(told)
    assert counts.total >= INPUTS - len(TARGETS)
    # Every reader was reached: it refused some inputs, and read others where no checksum refuses them.
    checked = {*CHECKED, "results", "int8 tensors", "scale answers"}
    for name, found in counts.tried.items():
        assert found[REFUSED] or name == "doctor", name
        assert found[SAME] + found[OTHER] or name in {*checked, "doctor"}, name
        assert not found[OTHER] or name not in checked, name


def test_an_input_is_the_same_at_every_making(made: Path) -> None:
    for name, target in TARGETS.items():
        seeds = target.seeds(made)
        contents = [seed.file.read_bytes() for seed in seeds]
        first, again = ([make_input(target, seeds, contents, 5, i).data for i in (0, 1, 2, 3)] for _ in range(2))
        assert first == again, name
        assert len({make_input(target, seeds, contents, seed, 0).data for seed in range(20)}) > 1, name


def test_every_kind_of_change_changes(made: Path) -> None:
    used = {kind: seed for target in TARGETS.values() for seed in target.seeds(made) for kind in seed.kinds}
    for kind, change in KINDS.items():
        data = used[kind].file.read_bytes()
        changed = [change(Random(i), data) for i in range(30)]
        assert sum(new != data for new in changed) > 15 and len(set(changed)) > 10, kind


def test_json_keeps_doubled_keys_and_its_meaning() -> None:
    text = '{"a":1,"a":[{"b":null}],"c":"é"}'
    assert parsed(text_of(parsed(text))) == parsed(text) and len(parsed(text)) == 3
    doubled = [change_json(Random(i), b'{"a": 1, "b": 2}') for i in range(500)]
    assert any(new.count(b'"a"') == 2 for new in doubled) and any(b"NaN" in new for new in doubled)


def outcome(path: Path, read: object, expected: object = "'x'", seconds: float = 5.0, memory: int = 64 << 20) -> str:
    return judge(read, path, expected, seconds, memory).outcome


def test_the_harness_tells_every_outcome(tmp_path: Path) -> None:
    def raises(error: BaseException) -> object:
        def read(path: Path) -> object:
            raise error

        return read

    def hangs(path: Path) -> object:
        while True:
            pass

    def hidden(path: Path) -> object:
        """Asks for far too much, and hides it."""
        try:
            raise MemoryError
        except MemoryError:
            raise DataInvalid("too large") from None

    path = tmp_path / "x"
    assert outcome(path, raises(DataInvalid("one line"))) == REFUSED
    assert outcome(path, lambda path: "x") == SAME and outcome(path, lambda path: "y") == OTHER
    assert outcome(path, raises(KeyError("vocab"))) == outcome(path, raises(OSError("odd"))) == TRACEBACK
    assert outcome(path, hangs, seconds=0.3) == HANG
    assert outcome(path, lambda path: len(bytearray(200 << 20))) == MEMORY
    assert outcome(path, raises(MemoryError())) == outcome(path, hidden) == MEMORY
    for line in ("", "two\nlines", "\x1b[31mred", "half \ud800", "x" * 1001):
        assert outcome(path, raises(Unclear(line))) == UNPRINTABLE
        assert not line or outcome(path, raises(DataInvalid(line))) == REFUSED  # every error of ours is one line
    assert outcome(path, raises(DataInvalid(f"{path} is odd" + "." * 900))) == REFUSED  # a path counts little
    with pytest.raises(KeyboardInterrupt):
        outcome(path, raises(KeyboardInterrupt()))


def test_every_planted_fault_is_found_and_the_rest_is_tried(made: Path) -> None:
    """In worker processes: one that dies or hangs is replaced, and every other input is still given."""
    target = PLANTED["planted"]
    seeds = target.seeds(made)
    contents = [seed.file.read_bytes() for seed in seeds]
    seed, inputs = PLANTED_SEED, 40
    faults = Counter(planted(make_input(target, seeds, contents, seed, number).data) for number in range(inputs))
    assert all(faults[fault] for fault in FAULTS) and planted(contents[0]) is None
    faults[HANG] += faults.pop("hang of native code")
    counts = run(made, ["planted"], inputs, seed, limits=Limits(0.5, patience=3.0))
    found = counts.tried["planted"]
    assert sum(found.values()) == inputs
    assert {fault: found[fault] for fault in FINDINGS} == {fault: faults[fault] for fault in FINDINGS}, counts.faults
    assert sum(counts.times.values()) == sum(faults[fault] for fault in FINDINGS)
    fault = next(fault for examples in counts.faults.values() for fault in examples if fault.outcome == TRACEBACK)
    with pytest.raises(KeyError):  # the input that the finding names
        path = made.parent / "again"
        path.write_bytes(make_input(target, seeds, contents, seed, fault.number).data)
        target.read(path)


def test_what_a_reader_left_behind_ends_with_its_worker(made: Path) -> None:
    counts = run(made, ["left behind"], 4, SEED)
    assert counts.tried["left behind"] == dict.fromkeys(OUTCOMES, 0) | {SAME: 4}, counts.faults
