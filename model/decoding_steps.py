"""Token-by-token decoding of sequences side by side; on CUDA each step is one launch of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 2
"""Steps before a graph is captured: they compile kernels and fill caches, which a graph cannot contain."""


class DecodingSteps:
    """A model's `step`, or its `step_hidden`, for the sequences of one ``state``, which it updates in place.

    On CUDA the first step captures the model's step as a CUDA graph, and every step replays it: the host then queues
    one graph instead of some dozen kernels a block, so that it does not bound the speed of a few sequences. The results
    are those of the model's step, bit for bit. On the CPU a step is the model's, as is that of a state whose tensors a
    step replaces (a simulated format), which no graph can contain.

    step   of the model: tokens (b,) int64 and the state -> (b, .)
    state  before the next token: as `new_state` makes it, or as `prefill` returns it
    """

    def __init__(self, step: Callable[[torch.Tensor, Any], torch.Tensor], state: Any) -> None:
        """``state``: of at least one sequence."""
        self._step, self.state = step, state
        self._captures = all(of_block.conv.is_cuda and of_block.in_place for of_block in state)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tokens, self._found = torch.empty(0), torch.empty(0)

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed one token to each of the first ``len(tokens)`` sequences; the later ones have ended.

        tokens (b,) int64 on any device; the result, (b, .), is the model's.
        """
        kept = len(self.state[0].conv)
        # A graph goes on with the ended sequences until half are left, since capturing one takes as long as some steps.
        # It also ends at one sequence, whose products an INT8 model rounds in another way.
        if len(tokens) < kept and (not self._captures or len(tokens) <= kept // 2):
            self.state = [of_block.first(len(tokens)) for of_block in self.state]
            self._graph = None
        if not self._captures:
            return self._step(tokens, self.state)
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._tokens[: len(tokens)].copy_(tokens, non_blocking=True)
        self._graph.replay()
        return self._found[: len(tokens)].clone()  # the next replay writes the same memory

    def _capture(self) -> None:
        """Capture the model's step; the state stays as it is."""
        tensors = _tensors(self.state)
        device, before = tensors[0].device, [tensor.clone() for tensor in tensors]
        self._tokens = torch.zeros(len(tensors[0]), dtype=torch.int64, device=device)
        with torch.cuda.device(device):
            aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    self._step(self._tokens, self.state)
            torch.cuda.current_stream(device).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._found = self._step(self._tokens, self.state)
        for tensor, now, value in zip(tensors, _tensors(self.state), before, strict=True):
            assert tensor.data_ptr() == now.data_ptr(), "a step that replaces its state cannot be captured"
            tensor.copy_(value)
        self._graph = graph


def _tensors(state: Any) -> list[torch.Tensor]:
    """The tensors of every block's state."""
    return [tensor for of_block in state for tensor in (of_block.conv, of_block.ssm)]
