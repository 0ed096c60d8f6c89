"""Command line of the training recipe."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import tokenizers
import torch

from quambase.schema.errors import QuambaseError
from training.card import write_card
from training.data import read_tokens, tokenize_books, train_tokenizer, write_tokens
from training.export import export_run, read_model, write_pytorch_model
from training.heldout import held_out
from training.loop import Recipe, Training
from training.networks import LanguageModel
from training.shape import SHAPES
from training.verify import mamba_ssm_forward


def _tokenizer(args: argparse.Namespace) -> None:
    train_tokenizer(args.text, args.out, vocab_size=args.vocab_size)
    print(args.out)


def _tokens(args: argparse.Namespace) -> None:
    print(write_tokens(tokenizers.Tokenizer.from_file(str(args.tokenizer)), args.text, args.out))


def _train(args: argparse.Namespace) -> None:
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    torch.backends.cuda.matmul.allow_tf32 = True
    training = Training(
        SHAPES[args.model],
        recipe,
        read_tokens(args.ids),
        args.run,
        device=args.device,
        compiled=args.compile,
        graph=args.graph,
    )
    measure = None
    if args.heldout:
        tokenizer = tokenizers.Tokenizer.from_file(str(args.tokenizer))
        documents = [ids[:-1] for ids in tokenize_books(tokenizer, args.heldout)]

        def measure(model: LanguageModel) -> dict[str, float]:
            compiled, model.compiled = model.compiled, False  # windows of many lengths
            figures = held_out(model, documents, device=args.device)
            model.compiled = compiled
            return figures

    done = training.run(
        minutes=args.minutes,
        log_every=args.log_every,
        measure_every=args.measure_every,
        measure=measure,
        show=functools.partial(print, file=sys.stderr, flush=True),
    )
    print("finished" if done else f"stopped after step {training.step} of {recipe.steps}; repeat to go on")


def _export(args: argparse.Namespace) -> None:
    print(export_run(args.run, args.tokenizer, args.out))


def _pytorch_model(args: argparse.Namespace) -> None:
    print(write_pytorch_model(args.folder, args.out))


def _evaluate(args: argparse.Namespace) -> None:
    dtype = getattr(torch, args.dtype)
    if args.mamba_ssm:
        forward = mamba_ssm_forward(args.folder, dtype)
    else:
        forward = read_model(args.folder, dtype=dtype).to(args.device)
    tokenizer = tokenizers.Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    documents = [ids[:-1] for ids in tokenize_books(tokenizer, args.heldout)]
    if args.logits:
        ids = documents[0][:48].astype(np.int64)
        with torch.no_grad():
            logits = forward(torch.from_numpy(ids)[None].to(args.device))[0]
        np.savez_compressed(args.logits, ids=ids, logits=logits.float().cpu().numpy())
    print(json.dumps(held_out(forward, documents[: args.documents], device=args.device)))


def _card(args: argparse.Namespace) -> None:
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    print(write_card(args.folder, recipe, json.loads(args.figures.read_text(encoding="utf-8"))))


def _recipe_options(parser: argparse.ArgumentParser) -> None:
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, metavar=str(value))


def parser() -> argparse.ArgumentParser:
    """The options of every step."""
    top = argparse.ArgumentParser(
        prog="python -m training",
        description="Train the reference models: tokenizer, tokens (once a text file), train, export, evaluate, card.",
    )
    steps = top.add_subparsers(required=True)

    step = steps.add_parser("tokenizer", help="train the byte-level BPE tokenizer")
    step.add_argument("text", type=Path, nargs="+", help="text files, plain or .xz")
    step.add_argument("--out", type=Path, required=True, help="tokenizer.json to write")
    step.add_argument("--vocab-size", type=int, default=8192)
    step.set_defaults(run_step=_tokenizer)

    step = steps.add_parser("tokens", help="tokenize one text file")
    step.add_argument("text", type=Path)
    step.add_argument("--tokenizer", type=Path, required=True)
    step.add_argument("--out", type=Path, required=True, help=".npy to write")
    step.set_defaults(run_step=_tokens)

    step = steps.add_parser("train", help="train, or go on training, in a run folder")
    step.add_argument("ids", type=Path, nargs="+", help="files that `tokens` wrote")
    step.add_argument("--model", choices=SHAPES, required=True)
    step.add_argument("--run", type=Path, required=True)
    step.add_argument("--device", default="cuda")
    step.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    step.add_argument("--graph", action=argparse.BooleanOptionalAction, default=True, help="capture a CUDA graph")
    step.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; repeat to go on")
    step.add_argument("--log-every", type=int, default=50)
    step.add_argument("--measure-every", type=int, default=0, help="steps between held-out measurements")
    step.add_argument("--heldout", type=Path)
    step.add_argument("--tokenizer", type=Path, help="needed with --heldout")
    _recipe_options(step)
    step.set_defaults(run_step=_train)

    step = steps.add_parser("export", help="a run's weights as a model folder")
    step.add_argument("run", type=Path)
    step.add_argument("--tokenizer", type=Path, required=True)
    step.add_argument("--out", type=Path, required=True)
    step.set_defaults(run_step=_export)

    step = steps.add_parser("pytorch-model", help="a model folder as mamba-ssm's from_pretrained reads it")
    step.add_argument("folder", type=Path)
    step.add_argument("--out", type=Path, required=True)
    step.set_defaults(run_step=_pytorch_model)

    step = steps.add_parser("evaluate", help="perplexity and accuracy on held-out documents")
    step.add_argument("folder", type=Path)
    step.add_argument("--heldout", type=Path, required=True)
    step.add_argument("--device", default="cuda")
    step.add_argument("--dtype", default="float32")
    step.add_argument("--documents", type=int, default=None, help="only the first so many")
    step.add_argument("--mamba-ssm", action="store_true", help="with mamba-ssm's model instead of ours")
    step.add_argument("--logits", type=Path, help="also write the logits of the first 48 tokens (.npz)")
    step.set_defaults(run_step=_evaluate)

    step = steps.add_parser("card", help="README.md and loss.png of a model folder")
    step.add_argument("folder", type=Path)
    step.add_argument("--figures", type=Path, required=True, help="JSON: {row: figures of evaluate, ...}")
    _recipe_options(step)
    step.set_defaults(run_step=_card)
    return top


def main() -> int:
    """Run one step; an error of the user's is one line and exit code 1."""
    args = parser().parse_args()
    try:
        args.run_step(args)
    except QuambaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
