"""The figures of docs/answers.md: prints `quambase` commands and what they answer.

python benchmarks/measure_scales.py mamba-5m --documents 100 --weights --alone 8
python benchmarks/measure_scales.py mamba2-8m --documents 100 --granularity --alone 4
python benchmarks/measure_scales.py MODEL_FOLDER --books BOOKS.txt --samples 512 --keep 6 --text NOVELS.txt \
    --last-words LAMBADA.jsonl

Calibration text: the model's own default, or passages of books. Test text: `sample:evaluation`, or --text.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ALONE = ("effect", "mse", "quamba", "percentile:0.999", "absmax")
"""Strategies that are measured one site at a time."""

PASSAGE, SKIPPED = 2000, 20_000
"""Characters of a passage, and of the front matter of a book, which is not calibrated on."""

LONG_BOOK = 60_000


def arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--books", type=Path, help="calibrate on passages of these books, apart by blank lines")
    parser.add_argument("--samples", type=int, default=128, help="calibration documents")
    parser.add_argument("--sensitivity", type=int, default=40, help="of them for the sensitivities")
    parser.add_argument("--keep", type=int, default=8, help="operators that `mixed` leaves in 16 bit")
    parser.add_argument("--text", action="append", default=[], help="evaluate on this text [sample:evaluation]")
    parser.add_argument("--last-words", type=Path, help="and on the last words of these rows")
    parser.add_argument("--documents", type=int, help="evaluate on so many documents of each text [all]")
    parser.add_argument("--granularity", action="store_true", help="also groups against one scale, of a Mamba-2")
    parser.add_argument("--weights", action="store_true", help="also weights in 4 bits")
    parser.add_argument("--alone", type=int, help="also one site at a time, on so many documents")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def passages(books: Path, samples: int, out: Path) -> None:
    """Four passages of every n-th long book, each from the beginning of a word, so that ``samples`` come out."""
    long = [book for book in books.read_text(encoding="utf-8").split("\n\n") if len(book) > LONG_BOOK]
    found = []
    for book in long[:: max(1, len(long) // (samples // 4))]:
        for number in range(4):
            start = SKIPPED + number * (len(book) - SKIPPED - 10_000) // 4
            start = book.index(" ", start) + 1
            found.append(book[start : start + PASSAGE])
    lines = [json.dumps({"text": text}) for text in found[:samples]]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def quambase(*words: str | Path) -> None:
    """Run a command; print it and what it answers."""
    command = [str(word) for word in words]
    print(f"\n$ quambase {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "quambase", *command], check=True, stderr=subprocess.STDOUT)


def main() -> None:
    """Collect, analyze and evaluate; print what comes out."""
    asked = arguments()
    with tempfile.TemporaryDirectory() as name:
        db, scales = Path(name) / "db", Path(name) / "scales.parquet"
        where = ["--db", db, "--device", asked.device]
        data: list[str | Path] = []
        if asked.books:
            data = ["--data", Path(name) / "passages.jsonl"]
            passages(asked.books, asked.samples, Path(name) / "passages.jsonl")
        collected = ["--samples", str(asked.samples), "--sensitivity", str(asked.sensitivity)]
        quambase("collect", "--model", asked.model, *data, *collected, *where)
        quambase("analyze", "--keep", f"16bit={asked.keep}", "--out", scales, "--db", db)
        few = ["--samples", str(asked.documents)] if asked.documents else []
        tested = ["evaluate", "--scales", scales, *few, *where]
        for text in asked.text or ["sample:evaluation"]:
            plain = [*tested, "--data", text, "--task", "perplexity"]
            quambase(*plain)
            if asked.granularity:
                quambase(*plain, "--granularity", "group", "--granularity", "tensor")
            if asked.weights:
                quambase(*plain, "--weights", "4bit")
        if asked.last_words:
            quambase(*tested, "--data", asked.last_words, "--task", "last-word")
        if asked.alone:
            chosen = [word for label in ALONE for word in ("--strategy", label)]
            text = (asked.text or ["sample:evaluation"])[0]
            quambase(
                "evaluate", "--scales", scales, "--one-at-a-time", "--data", text, "--samples", str(asked.alone),
                *chosen, *where,
            )  # fmt: skip


if __name__ == "__main__":
    main()
