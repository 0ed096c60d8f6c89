"""The training loop: AdamW, warm-up and cosine, checkpoints from which a run goes on as if it had not stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from quambase.schema.errors import CheckpointInvalid, DataInvalid
from quambase.schema.files import replacing
from training.data import TokenIds, Windows
from training.networks import LanguageModel
from training.shape import Shape

CHECKPOINT, LOG = "checkpoint.pt", "training.jsonl"


@dataclass(frozen=True)
class Recipe:
    """Everything besides shape and text that decides the weights. Lengths in tokens; ``lr`` is the peak."""

    tokens: int = 600_000_000
    length: int = 1024
    batch: int = 64
    lr: float = 3e-3
    warmup: int = 20_000_000
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self.tokens / (self.length * self.batch))

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear over the warm-up, then half a cosine that ends at zero."""
        warmup = max(1, round(self.warmup / (self.length * self.batch)))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices only: no norm, bias, time constant or skip (mamba-ssm's ``_no_weight_decay``)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim > 1 and not name.endswith("A_log") else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    lr = torch.tensor(recipe.lr, device=device) if on_gpu else recipe.lr  # a captured graph reads it from the device
    return torch.optim.AdamW(groups, lr=lr, betas=(recipe.beta1, recipe.beta2), fused=on_gpu, capturable=on_gpu)


class StepGraph:
    """A training step captured as a CUDA graph: launching a thousand small kernels one by one outlasts running them.

    The first steps run as they are, on a side stream, as capture demands; they count as any other.
    """

    EAGER = 3

    def __init__(self, update: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._update = update
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of ``update(ids)``; ids always of one shape."""
        self._calls += 1
        if self._calls <= self.EAGER:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call,unused-ignore]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                loss = self._update(ids)
            torch.cuda.current_stream().wait_stream(stream)
            return loss
        if self._graph is None:
            self._ids = ids.clone()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._loss = self._update(self._ids)
        self._ids.copy_(ids)
        self._graph.replay()  # type: ignore[no-untyped-call,unused-ignore]
        return self._loss.clone()


class Training:
    """A run in a folder: ``checkpoint.pt`` (weights, optimizer, step) and ``training.jsonl`` (the log)."""

    def __init__(
        self,
        shape: Shape,
        recipe: Recipe,
        ids: TokenIds,
        folder: Path,
        *,
        device: str = "cpu",
        compiled: bool = False,
        graph: bool = False,
    ) -> None:
        if ids.max(initial=0) >= shape.vocab_size:
            raise DataInvalid(
                f"a training token is {int(ids.max())}, the model's vocabulary {shape.vocab_size}; "
                "tokenize with the tokenizer of this model"
            )
        torch.manual_seed(recipe.seed)
        on_gpu = device.startswith("cuda")
        self.shape, self.recipe, self.folder = shape, recipe, folder
        self.model = LanguageModel(shape, dtype=torch.bfloat16 if on_gpu else torch.float32, compiled=compiled)
        self.model.to(device)
        self.optimizer = optimizer_of(self.model, recipe)
        self.windows = Windows(len(ids), recipe.length, recipe.batch, recipe.seed)
        self.ids = torch.from_numpy(ids.astype(np.int32)).to(device)
        self.offsets = torch.arange(recipe.length + 1, device=device)
        self.step = 0
        self._graph = StepGraph(self._update) if graph and on_gpu else None
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CHECKPOINT).exists():
            self._resume()

    def _identity(self) -> dict[str, Any]:
        return {"shape": asdict(self.shape), "recipe": asdict(self.recipe), "text_tokens": len(self.ids)}

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        found = torch.load(path, map_location=self.ids.device, weights_only=True)
        if found["identity"] != self._identity():
            raise CheckpointInvalid(
                f"{path} is of another run ({found['identity']}); expected {self._identity()}: choose another folder"
            )
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.step = int(found["step"])
        log = self.folder / LOG
        if log.exists():  # lines after the checkpoint are of steps that are trained again
            lines = [
                line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= self.step
            ]
            log.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        state = {
            "identity": self._identity(),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(self.folder / CHECKPOINT) as temporary:
            torch.save(state, temporary)

    def batch(self, step: int) -> torch.Tensor:
        """Token ids (batch, length + 1) of a step, on the device."""
        starts = torch.from_numpy(self.windows.starts(step)).to(self.ids.device, non_blocking=True)
        return self.ids[starts[:, None] + self.offsets].long()

    def train_step(self) -> torch.Tensor:
        """One optimizer step; its loss in nats, not yet read from the device."""
        lr = self.recipe.lr_at(self.step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        ids = self.batch(self.step)
        loss = self._graph(ids) if self._graph else self._update(ids)
        self.step += 1
        return loss

    def _update(self, ids: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model.loss(ids)
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        return loss.detach()

    def run(
        self,
        *,
        minutes: float = math.inf,
        log_every: int = 50,
        measure_every: int = 0,
        measure: Callable[[LanguageModel], dict[str, float]] | None = None,
        show: Callable[[str], None] = lambda line: None,
    ) -> bool:
        """Train to the recipe's end or for ``minutes``, save, and say whether the end was reached.

        A log line is {step, tokens, loss (mean over the steps since the last line), lr, tokens_per_second}, and what
        ``measure`` returns every ``measure_every`` steps (when a checkpoint is written too) and at the end.
        CheckpointInvalid: the loss is not finite.
        """
        per_step = self.recipe.batch * self.recipe.length
        began = since = time.monotonic()
        losses: list[torch.Tensor] = []
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            while self.step < self.recipe.steps and time.monotonic() - began < 60 * minutes:
                losses.append(self.train_step())
                last = self.step == self.recipe.steps
                due = bool(measure_every) and self.step % measure_every == 0
                if len(losses) < log_every and not (last or due):
                    continue
                loss = float(torch.stack(losses).mean())  # waits for the device
                if not math.isfinite(loss):
                    raise CheckpointInvalid(f"the loss is {loss} at step {self.step}; train with a lower --lr")
                now = time.monotonic()
                line: dict[str, float] = {
                    "step": self.step,
                    "tokens": self.step * per_step,
                    "loss": round(loss, 5),
                    "lr": round(self.recipe.lr_at(self.step - 1), 8),
                    "tokens_per_second": round(len(losses) * per_step / (now - since)),
                }
                if due or last:
                    self.save()
                    line |= measure(self.model) if measure is not None else {}
                log.write(json.dumps(line) + "\n")
                log.flush()
                show(json.dumps(line))
                losses, since = [], time.monotonic()
        self.save()
        return self.step == self.recipe.steps
