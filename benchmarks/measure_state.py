"""The figures of docs/state.md: INT8 models that decode a text from their cached state, by length, format and scale.

python benchmarks/measure_state.py mamba-5m --documents 100
python benchmarks/measure_state.py mamba-5m --samples 64 --sensitivity --state-every 16 --documents 16 \
    --text sample:evaluation python-docs:evaluation --device cpu
python benchmarks/measure_state.py MODEL_FOLDER --books BOOKS.txt --samples 512 --text NOVELS.txt --documents 10

Prints `quambase` commands and what they answer, a table of the state's formats, one of other fixed scales, and what the
model has that takes the state's scale from `quamba` and the others from `selected`. With --state-every only what
`selected`, `quamba` and `mse` lose where the state's scale is chosen by what decoding loses, beside what `analyze`
predicts.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from measure_scales import passages, quambase

from quambase.analyzer.summary import predicted_decoding_loss
from quambase.apply.evaluation.block_scorer import PlacedModels
from quambase.apply.evaluation.candidates import from_scales
from quambase.apply.evaluation.decoding import Decoding
from quambase.apply.evaluation.scoring import DECODED_TOKENS, blocks, score
from quambase.apply.evaluation.stored import find_evaluation
from quambase.apply.evaluation.tasks import read_tasks
from quambase.apply.int8.language_model import Int8LanguageModel
from quambase.apply.int8.state_formats import SimulatedState, StateFormat
from quambase.model.operators.choice import choose_device
from quambase.schema.scale_table import SELECTED, Scale, read_scales
from quambase.schema.stored.results import DECODE, PROMPT_TOKENS, STATE

FORMATS = (
    "int8", "int8:site", "int8:index", "int8:head", "int8:channel", "int8:channel:every=16", "int8:stochastic",
    "int8:channel:stochastic", "int8:feedback", "int8:channel:feedback", "fp8:channel", "fp8:channel:stochastic",
    "int16", "float16", "float32",
)  # fmt: skip
"""Formats of the state that are measured."""

SITE, FACTORS = "ssm_state_act:input", (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""The site of the state, and what its fixed scale is multiplied by."""

SHOWN = (8, 64, 512, 1024, 2048)
"""Ends of the buckets of tokens decoded that the tables have."""


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--books", type=Path, help="calibrate on passages of these books, apart by blank lines")
    parser.add_argument("--calibrate", type=Path, help="or on this text")
    parser.add_argument("--samples", type=int, default=128, help="calibration documents")
    parser.add_argument(
        "--state-every", type=int, help="choose the state's scale by decoding, from every so many tokens"
    )
    parser.add_argument(
        "--sensitivity", nargs="?", const="", help="with --state-every: gradients, of so many documents"
    )
    parser.add_argument("--text", nargs="+", default=["sample:evaluation"], help="the tables take the first")
    parser.add_argument("--documents", type=int, help="evaluate on so many documents [all]")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--picture", type=Path, help="save KL against the number of tokens decoded")
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    if (asked.state_every is None) != (asked.sensitivity is None):
        parser.error("--state-every and --sensitivity go together")
    return asked


def scaled(scale: Scale, factor: float) -> Scale:
    """One scale, or those of groups and state indices, times ``factor``."""
    if isinstance(scale, tuple):
        return tuple(scaled(part, factor) for part in scale)  # type: ignore[arg-type, return-value]
    assert isinstance(scale, float)
    return scale * factor


def of_formats(db: Path, label: str, model: Int8LanguageModel) -> None:
    """Print the newest evaluation's formats of the state, the least KL first, with their bytes."""
    rows = find_evaluation(db).by_position().to_pylist()
    ends = [end for end in SHOWN if any(row["decoded_to"] == end for row in rows)]
    print(f"\n| state of `{label}` | bytes | all | {' | '.join(f'to {end:,}' for end in ends)} | added |")
    print("|---" * (len(ends) + 4) + "|")
    wholes = [row for row in rows if row["decoded_from"] is None]
    for whole in sorted(wholes, key=lambda row: row["kl"]):
        name, _, form = whole["strategy"].partition(STATE)
        if name != label:
            continue
        state = (model.with_state(StateFormat.parse(form)) if form else model).new_state(1)
        size = sum(
            each.bytes_per_sequence if isinstance(each, SimulatedState) else each.conv.nbytes + each.ssm.nbytes
            for each in state
        )
        own = {row["decoded_to"]: row for row in rows if row["strategy"] == whole["strategy"]}
        cells = " | ".join(f"{1000 * own[end]['kl']:.3g}" for end in ends)
        limits = [whole[f"added{end}"] for end in ("_low", "_high")]  # none of few documents
        added = " to ".join("-" if end is None else f"{1000 * end:.3g}" for end in limits)
        print(f"| {form or 'codes (kernels)'} | {size:,} | {1000 * whole['kl']:.3g} | {cells} | {added} |")
    print(f"| prefill | | {1000 * wholes[0]['prefill_kl']:.3g} |")


def two_digits(value: float) -> str:
    """Two significant digits, or the whole number."""
    return f"{value:.2g}" if abs(value) < 99.5 else f"{value:.0f}"


def of_chosen(db: Path, scales: Path) -> None:
    """Print what each strategy of the newest evaluation loses, the least first, and what `analyze` predicts it to."""
    table = read_scales(scales).table.to_pylist()
    print("\n| text | scales | prefill | decoding | added | predicted |")
    print("|---|---|---|---|---|---|")
    wholes = [row for row in find_evaluation(db).by_position().to_pylist() if row["decoded_from"] is None]
    texts = list(dict.fromkeys(row["data"] for row in wholes))
    for row in sorted(wholes, key=lambda row: (texts.index(row["data"]), row["kl"])):
        label = row["strategy"]
        mine = [one for one in table if (one["selected"] if label == SELECTED else one["label"] == label)]
        limits = [row[f"added{end}"] for end in ("_low", "_high")]  # none of few documents
        added = two_digits(1000 * row["added"])
        added += "" if None in limits else f" ({' to '.join(two_digits(1000 * end) for end in limits)})"
        figures = f"{1000 * row['prefill_kl']:.3g} | {1000 * row['kl']:.3g} | {added}"
        loss = predicted_decoding_loss(mine)
        predicted = "" if loss is None else two_digits(1000 * loss)
        print(f"| {row['data']}, {row['documents']} documents | `{label}` | {figures} | {predicted} |")


def of_factors(scales: Path, label: str, asked: argparse.Namespace) -> None:
    """Print KL by decoding where the state's fixed scales are larger or smaller."""
    candidates = from_scales(scales, [label], None, False, quantize_embedding=False, compat=None)
    host = candidates.models[label]
    assert isinstance(host, Int8LanguageModel)
    models = {
        f"{factor:g}": host.with_scales(
            {key: scaled(scale, factor) if key[1] == SITE else scale for key, scale in host.scales.items()}
        )
        for factor in FACTORS
    }
    device = choose_device(asked.device)
    placed = PlacedModels.on(device, replace(candidates, models=models), required=False)
    source, none = candidates.source, Path(asked.text[0]).parent / "none"
    ((decode, _), _) = read_tasks(
        DECODE, asked.text[:1], source, asked.documents, asked.window, none, None, PROMPT_TOKENS
    )
    decoding = {
        name: Decoding(model, PROMPT_TOKENS)
        for name, model in placed.int8.items()
        if isinstance(model, Int8LanguageModel)
    }
    sums, tokens = dict.fromkeys(decoding, 0.0), 0
    for block in blocks(decode.items, DECODED_TOKENS[device.type]):
        found = score(placed.reference, decoding, block)
        tokens += sum(item.targets for item in block)
        for name in decoding:
            sums[name] += float(found[name].kl.sum())
    print(f"\n| `{label}`'s state scales times | {' | '.join(sums)} |")
    print("|---" * (len(sums) + 1) + "|")
    print(f"| KL x1000 | {' | '.join(f'{1000 * total / tokens:.3g}' for total in sums.values())} |")


def main() -> None:
    """Collect, analyze and decode; print what comes out."""
    asked = arguments()
    with tempfile.TemporaryDirectory() as name:
        db, scales = Path(name) / "db", Path(name) / "scales.parquet"
        where = ["--db", db, "--device", asked.device]
        data: list[str | Path] = []
        if asked.books:
            data = ["--data", Path(name) / "passages.jsonl"]
            passages(asked.books, asked.samples, Path(name) / "passages.jsonl")
        elif asked.calibrate:
            data = ["--data", asked.calibrate]
        if asked.state_every:
            sensitivity = ["--sensitivity", asked.sensitivity] if asked.sensitivity else ["--sensitivity"]
            data += [*sensitivity, "--state-every", str(asked.state_every)]
        quambase("collect", "--model", asked.model, *data, "--samples", str(asked.samples), *where)
        quambase("analyze", "--out", scales, "--db", db)
        few = ["--samples", str(asked.documents)] if asked.documents else []
        texts = asked.text if asked.state_every else asked.text[:1]
        decode = ["evaluate", "--scales", scales, "--mode", "decode", *(f"--data={text}" for text in texts), *few]
        decode += ["--window", str(asked.window), *where]
        if asked.state_every:
            quambase(*decode, *(f"--strategy={label}" for label in (SELECTED, "quamba", "mse")))
            of_chosen(db, scales)
            return
        quambase(*decode, "--strategy", "all")
        quambase(*decode, "--strategy", "quamba", *(word for form in FORMATS for word in ("--state", form)))
        if asked.picture:
            quambase("plot", "decoding", "--db", db, "--columns", "2", "--out", asked.picture)
        found = from_scales(scales, ["quamba"], None, False, quantize_embedding=False, compat=None).models["quamba"]
        assert isinstance(found, Int8LanguageModel)
        of_formats(db, "quamba", found)
        for label in ("quamba", "mse"):
            of_factors(scales, label, asked)
        mixed = ["--strategy", "quamba", "--at", SITE, "--otherwise", "selected", "--out", Path(name) / "mixed"]
        quambase("apply", "--scales", scales, *mixed, "--db", db)
        quambase("evaluate", Path(name) / "mixed", "--mode", "decode", "--data", asked.text[0], *few, *where)


if __name__ == "__main__":
    main()
