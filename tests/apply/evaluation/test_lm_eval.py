"""lm-eval's tasks on our models: its answers against our own last-word task, and against twins from logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import pytest
from click.testing import CliRunner, Result
from lm_eval.api.registry import get_model

from quambase.analyzer.analyze import analyze
from quambase.apply.apply import apply
from quambase.apply.evaluation import block_scorer, scoring
from quambase.apply.evaluation.evaluate import evaluate
from quambase.apply.evaluation.harness import plain_command
from quambase.apply.evaluation.harness.language_model import QuambaseModel
from quambase.apply.evaluation.stored import Evaluation
from quambase.apply.evaluation.summary import summarize
from quambase.apply.evaluation.summary_text import rank, readable
from quambase.cli.main import quambase
from quambase.collector.collect import collect
from quambase.model.checkpoint import load_model
from quambase.model.inputs.names import BUNDLED_DATA, SAMPLE
from quambase.model.packed_batch import Batch
from quambase.schema.errors import DataInvalid, UnknownName

MODEL = "mamba-5m"
STRATEGIES = ["quamba", "absmax"]

# A sum of n float32 products is off by about sqrt(n) 2^-24 of its size. Logits reach 30 and rest on sums over at most
# 1,024 channels of some 20 layers' outputs: sqrt(20) * sqrt(1024) * 30 * 2^-24 = 2.6e-4 for each predicted token.
LOGIT_ERROR = 2.6e-4

TASKS = {
    "words": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{right}}"
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
""",
    "written": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "scored": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 2, do_sample: false}
metric_list:
  - {metric: bleu, aggregation: bleu, higher_is_better: true}
""",
    "elsewhere": """
output_type: loglikelihood
dataset_path: nobody/nothing-of-this-name
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
""",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Local tasks and their data, and a scale table of the bundled model; not to be written to."""
    root = tmp_path_factory.mktemp("harness")
    passages = [row["text"] for row in lines(SAMPLE / BUNDLED_DATA["sample:last-word"])]
    # Spaces before the last word belong to the continuation; what lies before the text does not matter.
    rows = {
        "words": [{"text": text} for text in [*passages[:40], "a man of  the world", " one of the  most"]],
        "texts": [{"text": text} for text in passages[:12]],
        "choices": [
            {
                "question": text.rsplit(" ", 1)[0],
                "choices": [
                    # One wrong answer is long: its log-likelihood is less, that of each letter is more.
                    passages[40 + (n + k - n % 3) % 20].rsplit(" ", 1)[1] + " of the world" * (k == (n + 1) % 3)
                    for k in range(3)
                ],
                "right": n % 3,
            }
            for n, text in enumerate(passages[40:60])
        ],
        "written": [{"question": text[:40], "answer": " of the"} for text in passages[:12]],
    }
    (root / "tasks").mkdir()
    for name, rest in TASKS.items():
        data = root / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows.get(name, rows["written"])))
        where = "" if name == "elsewhere" else f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (root / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{where}test_split: test\n{rest}")
    collect(MODEL, 4, db=root / "db", progress=False)
    analyze(root / "db", strategies=STRATEGIES, out=root / "scales.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        yield root


def run(world: Path, db: Path, *names: str, **options: Any) -> Evaluation:
    chosen = {"scales": world / "scales.parquet", "strategies": STRATEGIES} | options
    return evaluate(tasks=names, include_path=world / "tasks", db=db, device="cpu", **chosen)


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of(evaluation: Evaluation, strategy: str, data: str) -> list[dict[str, Any]]:
    table = evaluation.results
    mask = pc.and_(pc.equal(table["strategy"], strategy), pc.equal(table["data"], data))
    return sorted(table.filter(mask).to_pylist(), key=lambda row: row["document"])


class Twin:
    """Answers from the logits of one sequence at a time, by NumPy in float64."""

    def __init__(self) -> None:
        loaded = load_model(MODEL)
        self.tokenizer, self.model = loaded.tokenizer, loaded.floating()

    def log_p(self, tokens: Sequence[int], first: int) -> tuple[float, bool]:
        """log p of ``tokens[first:]``, and whether each was the most likely one."""
        logits = self.model.logits(self.model.hidden(Batch.pack([list(tokens)]))).double().numpy()
        logits = logits[first - 1 : -1]
        shifted = logits - logits.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        follows = np.array(tokens[first:])
        return float(log_p[np.arange(len(follows)), follows].sum()), bool((logits.argmax(1) == follows).all())

    def in_windows(self, tokens: Sequence[int], window: int) -> float:
        """log p of a text: the first ``window`` tokens after the end-of-text token, then ``window`` at a time, of which
        those that were predicted before are context.
        """
        total, done = 0.0, 0
        while done < len(tokens):
            end = min(done + window, len(tokens))
            sequence = [0, *tokens[:end]] if done == 0 else tokens[end - window - 1 : end]
            total += self.log_p(sequence, len(sequence) - (end - done))[0]
            done = end
        return total


@pytest.fixture(scope="module")
def twin() -> Twin:
    return Twin()


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def test_last_words_are_ours_document_by_document(world: Path, tmp_path: Path) -> None:
    """The same items in the same blocks: not one bit may differ, for any model."""
    theirs = run(world, tmp_path, "words")
    ours = evaluate(
        scales=world / "scales.parquet",
        strategies=STRATEGIES,
        data=world / "words.jsonl",
        task="last-word",
        db=tmp_path,
        device="cpu",
    )
    assert theirs.about["tasks"][0]["documents"] == 42
    for strategy in ("float", *STRATEGIES):
        mine, other = of(ours, strategy, "words.jsonl"), of(theirs, strategy, "words")
        for name in ("document", "tokens", "nll", "kl", "top1_agreement", "top1_right", "correct"):
            assert [row[name] for row in mine] == [row[name] for row in other], (strategy, name)
        assert 0 < sum(row["correct"] for row in mine) < 42
    figures = (
        "tokens",
        "kl",
        "kl_low",
        "flips",
        "perplexity",
        "accuracy",
        "accuracy_low",
        "vs_float_p",
        "within_verdict",
    )
    summaries = [summarize(one.results).select(figures).to_pylist() for one in (ours, theirs)]
    assert summaries[0] == summaries[1]


def test_log_likelihoods_are_those_of_the_logits(twin: Twin) -> None:
    model = get_model("quambase").create_from_arg_obj({"path": MODEL, "max_length": 24}, {"device": "cpu"})
    long = (
        "in the genuine reasoning, is his reason. The artist, who, I believe, means to show himself as a man who knew"
    )
    pairs = [
        ("a man of ", "the world"),
        ("", "of the world"),
        (long, " everything"),
        ("a man", " of"),
        ("a man", " of"),
    ]
    found = model.loglikelihood(asked(*pairs), disable_tqdm=True)
    encode = twin.tokenizer.encode
    contexts = [encode("a man of"), [0], encode(long), *[encode("a man")] * 2]
    wholes = [encode("a man of the world"), [0, *encode("of the world")], encode(f"{long} everything")]
    wholes += [encode("a man of")] * 2
    assert len(wholes[2]) > 25  # one is cut: 24 tokens before the last
    for answer, context, whole in zip(found, contexts, wholes, strict=True):
        kept = whole[-25:]
        log_p, right = twin.log_p(kept, len(kept) - (len(whole) - len(context)))
        assert answer[0] == pytest.approx(log_p, abs=LOGIT_ERROR * len(whole)) and answer[1] == right
    assert found[3] == found[4]
    with pytest.raises(DataInvalid, match=r"a continuation of \d+ tokens is longer than the window of 24"):
        model.loglikelihood(asked(("a", long * 2)), disable_tqdm=True)


def test_whole_texts_in_windows(twin: Twin) -> None:
    """Each token is predicted once; the last window begins as far back as it may."""
    model = QuambaseModel(MODEL, device="cpu", max_length=8)
    texts = ["a man of the world", "in the genuine reasoning, is his reason. The artist, who, I believe, means to"]
    found = model.loglikelihood_rolling(asked(*[(text,) for text in texts]))
    for text, value in zip(texts, found, strict=True):
        tokens = twin.tokenizer.encode(text)
        assert value == pytest.approx(twin.in_windows(tokens, 8), abs=LOGIT_ERROR * len(tokens))


def test_greedy_text_is_that_of_whole_passes(twin: Twin) -> None:
    model = QuambaseModel(MODEL, device="cpu")
    settings = {"until": ["."], "max_gen_toks": 6}
    (found,) = model.generate_until(asked(("The artist, who", settings)))
    tokens = twin.tokenizer.encode("The artist, who")
    prompt = len(tokens)
    for _ in range(6):
        logits = twin.model.logits(twin.model.hidden(Batch.pack([tokens])))[-1]
        tokens.append(int(logits.argmax()))
    text = twin.tokenizer.decode(tokens[prompt:])
    assert found == text.split(".")[0] and found
    stop = found[2:4]
    (cut,) = model.generate_until(asked(("The artist, who", {"until": stop, "max_gen_toks": 6})))
    assert cut == found[: found.index(stop)]
    with pytest.raises(DataInvalid, match="quambase generates greedily"):
        model.generate_until(asked(("a", {"do_sample": True})))


def test_choices_are_by_log_likelihood(world: Path, tmp_path: Path, twin: Twin) -> None:
    found = run(world, tmp_path, "choices", strategies=["absmax"])
    assert {row["data"] for row in found.results.to_pylist()} == {"choices:acc", "choices:acc_norm"}
    rows = lines(world / "choices.jsonl")
    encode = twin.tokenizer.encode
    plain, normed = of(found, "float", "choices:acc"), of(found, "float", "choices:acc_norm")
    for row, one, other in zip(rows, plain, normed, strict=True):
        # lm-eval puts a space before each choice.
        context, wholes = encode(row["question"]), [encode(f"{row['question']} {choice}") for choice in row["choices"]]
        log_p = np.array([twin.log_p(whole, len(context))[0] for whole in wholes])
        per_letter = log_p / [len(choice) for choice in row["choices"]]
        right = row["right"]
        assert one["correct"] == (log_p.argmax() == right) and other["correct"] == (per_letter.argmax() == right)
        assert one["tokens"] == len(wholes[right]) - len(context)
        assert one["nll"] == pytest.approx(-log_p[right], abs=LOGIT_ERROR * len(wholes[right]))
    assert 0 < sum(row["correct"] for row in plain) < 20
    assert any(one["correct"] != other["correct"] for one, other in zip(plain, normed, strict=True))
    assert all(row["kl"] > 0 for row in of(found, "absmax", "choices:acc"))


def test_a_text_without_right_and_wrong(world: Path, tmp_path: Path, twin: Twin) -> None:
    found = run(world, tmp_path, "texts", strategies=["absmax"], window=20)
    rows = lines(world / "texts.jsonl")
    for row, stored in zip(rows, of(found, "float", "texts"), strict=True):
        tokens = twin.tokenizer.encode(row["text"])
        assert stored["tokens"] == len(tokens) > 20 and stored["correct"] is None
        assert stored["nll"] == pytest.approx(-twin.in_windows(tokens, 20), abs=LOGIT_ERROR * len(tokens))
    summary = summarize(found.results).to_pylist()[0]
    total = sum(row["nll"] for row in of(found, "float", "texts"))
    assert summary["accuracy"] is None and summary["perplexity"] == pytest.approx(np.exp(total / summary["tokens"]))


def test_generated_answers_have_no_kl_and_the_summary_says_so(world: Path, tmp_path: Path) -> None:
    found = run(world, tmp_path, "written", strategies=["absmax", "quamba"])
    for name in ("tokens", "nll", "kl", "top1_agreement", "top1_right"):
        assert found.results[name].null_count == found.results.num_rows == 36
    summary = summarize(found.results)
    assert all(row["kl"] is None and row["vs_float_verdict"] is not None for row in summary.to_pylist()[1:])
    (text,) = rank(summary)
    assert "no KL, flips or perplexity: they need the log-likelihood of a right answer" in text.sentences[0]
    assert readable(summary).figures["KL x1000"].to_pylist() == ["-"] * 3
    again = run(world, tmp_path, "written", strategies=["absmax"])
    done = command("diff", found.id, again.id, "--db", str(tmp_path))
    assert done.exit_code == 0 and "accuracy" in done.output, done.output
    with pytest.raises(DataInvalid, match=r"task scored has no metric that is 0 or 1 .*bleu.*leave it out"):
        run(world, tmp_path, "scored", strategies=["absmax"])


def test_an_interrupted_evaluation_goes_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scoring.BLOCK_TOKENS, "cpu", 600)
    whole = run(world, tmp_path / "whole", "choices", "words")
    scored, real = [], block_scorer.BlockScorer.score

    def dies(self: Any, task: Any, items: Any, progress: Any) -> Any:
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(task.data)
        return real(self, task, items, progress)

    def counts(self: Any, task: Any, items: Any, progress: Any) -> Any:
        scored.append(task.data)
        return real(self, task, items, progress)

    monkeypatch.setattr(block_scorer.BlockScorer, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "killed", "choices", "words")
    monkeypatch.setattr(block_scorer.BlockScorer, "score", counts)
    again = run(world, tmp_path / "killed", "choices", "words")
    assert again.id == whole.id and again.results.equals(whole.results)
    resumed = len(scored)
    assert run(world, tmp_path / "killed", "choices", "words").results.equals(whole.results)
    assert len(scored) == resumed  # finished: nothing is scored
    run(world, tmp_path / "once", "choices", "words")
    assert len(scored) == 2 * resumed and resumed > 4  # each block was scored once


def command(*arguments: str) -> Result:
    return CliRunner().invoke(quambase, list(arguments))


def test_the_command_takes_lists_and_repetitions(world: Path, tmp_path: Path) -> None:
    shared = ["--include-path", str(world / "tasks"), "--db", str(tmp_path), "--device", "cpu", "--limit", "12"]
    shared += ["--scales", str(world / "scales.parquet"), "--strategy", "absmax", "--strategy", "quamba"]
    listed = command("evaluate", "--tasks", "words,choices", *shared)
    repeated = command("evaluate", "--tasks", "words", "--tasks", "choices", *shared, "--format", "json")
    assert listed.exit_code == repeated.exit_code == 0, listed.output
    rows = json.loads(repeated.stdout)
    assert {(row["task"], row["data"], row["documents"]) for row in rows} == {
        ("lm-eval", name, 12) for name in ("words", "choices:acc", "choices:acc_norm")
    }
    assert "words, lm-eval: 12 documents" in listed.stdout and "right %" in listed.stdout
    assert max(map(len, listed.stdout.splitlines())) <= 100
    shown = command("results", "--db", str(tmp_path))
    assert shown.exit_code == 0 and shown.stdout == listed.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "words", "--data", "a.txt"], "--tasks brings its own text"),
        (["--tasks", "words", "--task", "perplexity"], "--tasks brings its own text"),
        (["--tasks", "words", "--one-at-a-time"], "--tasks brings its own text"),
        (["--include-path", "."], "--include-path goes with --tasks"),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(arguments: list[str], message: str) -> None:
    done = command("evaluate", "--float", "--model", MODEL, *arguments)
    assert done.exit_code == 2 and message in done.output


def test_wrong_names_are_one_line(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match="unknown lm-eval task 'lambada_opnai'; did you mean lambada_openai"):
        run(world, tmp_path, "lambada_opnai")
    with pytest.raises(UnknownName, match="unknown key of --model_args 'pth'; did you mean path"):
        QuambaseModel.create_from_arg_string("pth=mamba-5m")
    with pytest.raises(DataInvalid, match="names no model; expected path=FOLDER_OR_NAME"):
        QuambaseModel.create_from_arg_string("strategy=mse")
    monkeypatch.setattr("quambase.apply.evaluation.harness.find_spec", lambda name: None)
    with pytest.raises(DataInvalid, match=r"lm-eval is not installed.*pip install 'quambase\[eval\]'"):
        run(world, tmp_path, "words")


def process(world: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(world / "home")}
    line = [sys.executable, "-m", "quambase", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | offline)


def test_a_missing_data_set_is_one_line_offline(world: Path, tmp_path: Path) -> None:
    shared = ["--float", "--model", MODEL, "--include-path", str(world / "tasks"), "--db", str(tmp_path)]
    done = process(world, "evaluate", "--tasks", "elsewhere", *shared)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "error: lm-eval cannot load elsewhere" in done.stderr and "--include-path" in done.stderr


def plain(world: Path, site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`lm_eval` itself in a new process whose site-packages ``site`` is one of, started as Python starts with them."""
    start = f"import site; site.addsitedir({str(site)!r}); from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    given = ["--model", "quambase", "--device", "cpu", "--tasks", "words", "--include_path", str(world / "tasks")]
    line = [sys.executable, "-c", start, *given, "--limit", "3", *arguments]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(world / "cache")}
    return subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | offline)


def test_the_plain_command_knows_our_model_where_a_user_wants_that(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_command, "site_packages", lambda: tmp_path)
    model = ["--model_args", f"path={MODEL}"]
    assert "Unknown model 'quambase'" in plain(world, tmp_path, *model).stderr
    done = CliRunner().invoke(quambase, ["lm-eval", "--enable"])
    assert done.exit_code == 0 and "next: lm_eval --model quambase" in done.output
    assert {path.name for path in tmp_path.iterdir()} == {"quambase_lm_eval.py", "quambase_lm_eval.pth"}
    found = plain(world, tmp_path, *model)
    assert found.returncode == 0, found.stderr
    assert "quambase ({'path': 'mamba-5m'})" in found.stdout and "|acc       |" in found.stdout
    # `quambase lm-eval` and other models go on as before.
    assert process(world, "lm-eval", "--model", "quambase", *model, "--tasks", "none").returncode != 0
    other = plain(world, tmp_path, "--model", "dummy")
    assert other.returncode == 0 and "|acc       |" in other.stdout
    for said in ("no longer knows", "did not know"):
        done = CliRunner().invoke(quambase, ["lm-eval", "--disable"])
        assert done.exit_code == 0 and said in done.output and not list(tmp_path.iterdir())
    assert "Unknown model 'quambase'" in plain(world, tmp_path, *model).stderr
    for arguments in (["--enable", "--disable"], ["--enable", "--tasks", "words"]):
        assert CliRunner().invoke(quambase, ["lm-eval", *arguments]).exit_code == 2


def test_a_folder_that_python_does_not_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataInvalid, match=r"Python does not read .*; use `quambase lm-eval ARGUMENTS`"):
        plain_command.enable()
    assert not list(tmp_path.iterdir())


def test_weights_rounded_by_gptq(world: Path, tmp_path: Path) -> None:
    """`gptq` and `db` of --model_args: the answers of `evaluate`'s model, and others than of rounding to nearest."""
    db, scales = tmp_path / "db", tmp_path / "scales.parquet"
    collect(MODEL, 4, db=db, second_moments=4, progress=False)
    analyze(db, strategies=STRATEGIES, out=scales)
    four: dict[str, Any] = {"scales": str(scales), "strategy": "absmax", "weight_bits": 4, "device": "cpu"}
    asked = ("he said that he had never", " seen")
    answers = {
        gptq: QuambaseModel(MODEL, gptq=gptq, db=str(db), **four).loglikelihood([SimpleNamespace(args=asked)])
        for gptq in (False, True)
    }
    assert answers[True] != answers[False]
    folder = apply(scales, strategy="absmax", db=db, weight_bits=4, gptq=True).folder
    assert QuambaseModel(folder, device="cpu").loglikelihood([SimpleNamespace(args=asked)]) == answers[True]


def test_lm_evals_own_command_runs_an_int8_model(world: Path, tmp_path: Path) -> None:
    """Its log of samples has our answers, for an applied folder and for a strategy built in memory."""
    folder = apply(world / "scales.parquet", strategy="absmax", db=tmp_path).folder
    ours = run(world, tmp_path, "words", strategies=["absmax"])
    expected = [(row["correct"], -row["nll"]) for row in of(ours, "absmax", "words")]
    built = f"path={MODEL},scales={world / 'scales.parquet'},strategy=absmax"
    for number, model in enumerate([f"path={folder}", built]):
        out = tmp_path / f"out{number}"
        shared = ["--model", "quambase", "--model_args", model, "--device", "cpu", "--tasks", "words"]
        more = ["--include_path", str(world / "tasks"), "--log_samples", "--output_path", str(out)]
        done = process(world, "lm-eval", *shared, *more)
        assert done.returncode == 0, done.stderr
        (log,) = out.rglob("samples_words_*.jsonl")
        samples = sorted(lines(log), key=lambda sample: int(sample["doc_id"]))
        # One model is scored alone here, in blocks of the same documents: the same bits.
        assert [(bool(sample["acc"]), sample["perplexity"]) for sample in samples] == expected
        accuracy = sum(right for right, _ in expected) / len(expected)
        assert f"|acc       |↑  |{accuracy:7.4f}|" in done.stdout
