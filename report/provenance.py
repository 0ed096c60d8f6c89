"""Where the numbers come from: model, text, hashes, versions, and the commands that make them again."""

from __future__ import annotations

import shlex
from typing import Any

from quambase.analyzer.strategies import parse_labels
from quambase.apply.evaluation.decode_summary import base_of
from quambase.report.contents import SCALES, Contents
from quambase.schema.commands import run_command
from quambase.schema.scale_table import EFFECT, IN_16_BIT, QUAMBASE, ScaleTable
from quambase.schema.stored.manifest import Manifest
from quambase.schema.stored.results import DECODE, PROMPT_TOKENS, STATE, WINDOW

Facts = list[tuple[str, str]]
"""Names and what they are."""


def facts(contents: Contents) -> list[tuple[str, Facts]]:
    """What is known of the run, the scale table and the evaluation, a heading each."""
    found = [("Run", _of_run(contents.manifest))]
    if contents.scales is not None:
        found.append(("Scale table", _of_scales(contents, contents.scales)))
    for evaluation, name in zip(contents.evaluations, ("Evaluation", "Evaluation by decoding"), strict=False):
        found.append((name, _of_evaluation(evaluation.about)))
    return found


def commands(contents: Contents) -> list[str]:
    """The commands that make the run, the scale table and the evaluation again."""
    found = [run_command(contents.manifest)]
    if contents.scales is not None:
        found.append(_analyze(contents, contents.scales))
    return [*found, *(_evaluate(contents, evaluation.about) for evaluation in contents.evaluations)]


def _of_run(manifest: Manifest) -> Facts:
    identity, model, text = manifest.identity, manifest.model, manifest.data
    sizes = ", ".join(f"{name} {value:,}" for name, value in model.sizes.items())
    read = f"{text.documents:,} documents with {text.tokens:,} tokens"
    left = [f"{text.empty:,} empty"] * bool(text.empty) + [f"{text.truncated:,} truncated"] * bool(text.truncated)
    found = [
        ("run", manifest.run),
        ("model", f"{model.name} ({model.family}; {sizes})" if sizes else f"{model.name} ({model.family})"),
        ("text", f"{text.name}: {read}" + (f" ({', '.join(left)})" if left else "")),
    ]
    for key, name in (
        ("weights_sha256", "weights, SHA-256"),
        ("tokenizer_sha256", "tokenizer, SHA-256"),
        ("documents", "texts, SHA-256"),
        ("seq_len", "tokens per document at most"),
        ("block", "documents per forward pass"),
        ("activation_dtype", "activations counted as"),
        ("device", "device"),
    ):
        found += [(name, str(identity[key]))] if key in identity else []
    if "sensitivity" in identity:
        asked = identity["sensitivity"]
        found.append(("sensitivities", f"of {asked['documents']} documents, {asked['tokens']:,} tokens"))
    versions = manifest.created.get("versions", {})
    if versions:
        found.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return found


def _of_scales(contents: Contents, scales: ScaleTable) -> Facts:
    about = scales.provenance
    left = [f"layer {layer} {name}" for layer, name in about.get(IN_16_BIT, ())]
    return [
        ("file", str(contents.path)),
        ("made by", f"quambase {about.get('quambase', 'of unknown version')}"),
        ("granularity", str(about.get("granularity"))),
        ("selected by", f"{about.get('select', EFFECT)}, for {about.get('target', QUAMBASE)}"),
        ("strategies", ", ".join(scales.labels())),
        *([("left in 16 bit by mixed", ", ".join(left))] if left else []),
    ]


def _of_evaluation(about: dict[str, Any]) -> Facts:
    texts = [f"{text['data']} ({text['task']}, {text['documents']} documents)" for text in about["tasks"]]
    known = {key: about[key] for key in ("device", "window", "results_sha256") if key in about}
    return [
        ("evaluation", about["evaluation"]),
        ("strategies", ", ".join(map(str, about["strategies"]))),
        ("texts", "; ".join(texts)),
        *((name.replace("_sha256", ", SHA-256"), str(value)) for name, value in known.items()),
    ]


def _analyze(contents: Contents, scales: ScaleTable) -> str:
    about, labels = scales.provenance, scales.labels()
    words = ["quambase", "analyze", "--run", contents.manifest.run]
    sensitive = "sensitivity" in contents.manifest.identity
    usual = {choice.label for choice in parse_labels(None) if sensitive or not choice.strategy.needs_sensitivity}
    if set(labels) != usual:
        words += [word for label in labels for word in ("--strategy", label)]
    for option, default in (("target", QUAMBASE), ("select", EFFECT)):
        value = str(about.get(option, default))
        words += [f"--{option}", value] if value != default else []
    words += ["--keep", f"16bit={len(scales.in_16_bit)}"] if scales.in_16_bit else []
    words += ["--out", str(contents.path)] if contents.path != SCALES else []
    return shlex.join(words)


def _evaluate(contents: Contents, about: dict[str, Any]) -> str:
    words = ["quambase", "evaluate", "--scales", str(about["scales"])]
    labels = [] if contents.scales is None else [*contents.scales.labels(), contents.scales.default_label]
    asked = dict.fromkeys(base_of(str(label)) for label in about["strategies"])
    every = bool(labels) and set(labels) <= set(asked)
    words += [word for label in (["all"] if every else asked) for word in ("--strategy", label)]
    texts = about["tasks"]
    words += [word for data in dict.fromkeys(str(text["data"]) for text in texts) for word in ("--data", data)]
    samples = max((int(text["documents"]) + int(text.get("skipped", 0)) for text in texts), default=0)
    words += ["--samples", str(samples)]
    window = about.get("window", WINDOW)
    words += ["--window", str(window)] if window != WINDOW else []
    return shlex.join([*words, *_decoding(about)])


def _decoding(about: dict[str, Any]) -> list[str]:
    """The options of an evaluation by decoding; none of another one."""
    prompts = {int(text["prompt"]) for text in about["tasks"] if text["task"] == DECODE}
    if not prompts:
        return []
    (prompt,) = prompts
    states = dict.fromkeys(
        form for _, _, form in (str(label).partition(STATE) for label in about["strategies"]) if form
    )
    words = ["--mode", DECODE, *(word for form in states for word in ("--state", form))]
    return [*words, "--prompt-tokens", str(prompt)] if prompt != PROMPT_TOKENS else words
