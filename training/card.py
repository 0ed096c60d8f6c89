"""The model card: figures and loss curve of a training run, beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.export import shape_of
from training.loop import LOG, Recipe

PICTURE = "loss.png"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_loss(log: list[dict[str, Any]], destination: Path) -> Path:
    """Training and held-out loss in nats a token over the tokens seen, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([x["tokens"] / 1e6 for x in log], [x["loss"] for x in log], lw=0.8, label="training (batch mean)")
    measured = [x for x in log if "heldout_loss" in x]
    axes.plot([x["tokens"] / 1e6 for x in measured], [x["heldout_loss"] for x in measured], "o-", label="held out")
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("cross entropy (nats a token)")
    axes.set_ylim(top=6.0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(destination, dpi=110, metadata={"Software": None})
    return destination


def write_card(folder: Path, recipe: Recipe, figures: dict[str, Any]) -> Path:
    """README.md and loss.png of a model folder that holds config.json, model.safetensors and training.jsonl.

    ``figures`` is {what: {heldout_loss, heldout_perplexity, heldout_accuracy, heldout_targets}, ...}, one row each;
    further entries that are strings become paragraphs.
    """
    log = read_log(folder / LOG)
    plot_loss(log, folder / PICTURE)
    shape = shape_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    kind = "Mamba-1" if shape.architecture == "mamba1" else "Mamba-2"
    sizes = f"d_model {shape.d_model}, {shape.n_layer} layers, d_inner {shape.d_inner}, d_state {shape.d_state}"
    if kind == "Mamba-2":
        sizes += f", {shape.heads} heads of {shape.headdim}, {shape.ngroups} SSD groups"
    speed = sorted(x["tokens_per_second"] for x in log)[len(log) // 2]
    rows = [(what, row) for what, row in figures.items() if isinstance(row, dict)]
    table = "\n".join(
        f"| {what} | {row['heldout_loss']:.4f} | {row['heldout_perplexity']:.2f} | {row['heldout_accuracy']:.4f} |"
        for what, row in rows
    )
    more = "\n\n".join(text for text in figures.values() if isinstance(text, str))
    (folder / "README.md").write_text(
        f"""# {folder.name}

A small {kind} language model of English novels, made for tests, examples and measurements of quantization: {sizes},
vocabulary {shape.vocab_size}; bfloat16, head tied to the embedding, mamba-ssm layout.

## Training

`python -m training train` on public-domain English novels (five files of 85 MB, one paragraph a line);
byte-level BPE trained on the first of them by `python -m training tokenizer`.

| | |
|---|---|
| tokens seen | {log[-1]["tokens"]:,} in {log[-1]["step"]:,} steps of {recipe.batch} windows of {recipe.length} |
| learning rate | {recipe.lr:g}, linear warm-up over {recipe.warmup:,} tokens, cosine to zero |
| AdamW | betas {recipe.beta1:g}, {recipe.beta2:g}; weight decay {recipe.weight_decay:g}; clip {recipe.clip:g} |
| seed, precision | {recipe.seed}; bfloat16 activations, float32 parameters |
| speed | {speed:,} tokens a second, one H100 |

![loss curve](loss.png)

The curve's points are in `training.jsonl`.

## Figures on 40 held-out novels

Windows of 512 tokens, {rows[0][1]["heldout_targets"]:,} targets, weights rounded to bfloat16.

| | loss (nats a token) | perplexity | next-token accuracy |
|---|---|---|---|
{table}

{more}
""",
        encoding="utf-8",
    )
    return folder / "README.md"
