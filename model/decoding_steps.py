"""Token-by-token decoding of a fixed number of sequences; on CUDA each step is one launch of a CUDA graph."""

from __future__ import annotations

from typing import Any, Protocol

import torch

WARM_UP = 2
"""Steps before a graph is captured: they compile kernels and fill caches, which a graph cannot contain."""


class StepModel(Protocol):
    """A model that takes token after token, floating-point or INT8."""

    @property
    def device(self) -> torch.device: ...

    def new_state(self, sequences: int) -> Any: ...

    def step(self, tokens: torch.Tensor, state: Any) -> torch.Tensor: ...


class DecodingSteps:
    """`step` of a model for the sequences of one ``state``, which it updates in place.

    On CUDA the first step captures the model's step as a CUDA graph, and every step replays it: the host then queues
    one graph instead of some dozen kernels a block, so that it does not bound the speed of a few sequences. The results
    are those of the model's step, bit for bit. On the CPU a step is the model's.

    state  the state before the next token: as `new_state` makes it, or as `prefill` returns it
    """

    def __init__(self, model: StepModel, state: Any) -> None:
        """``state``: of at least one sequence on the model's device. Later states must have its shapes (`restart`)."""
        self.model, self.state = model, state
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tokens: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None

    @torch.inference_mode()
    def restart(self, state: Any) -> None:
        """Go on from a copy of ``state``, of as many sequences; a captured graph stays valid."""
        for mine, other in zip(_tensors(self.state), _tensors(state), strict=True):
            if mine.shape != other.shape:
                raise ValueError(f"a state of shape {tuple(other.shape)} was given; expected {tuple(mine.shape)}")
            mine.copy_(other)

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed one token to each sequence: tokens (b,) int64 on any device; logits (b, v), as the model's `step`."""
        if self.model.device.type != "cuda":
            return self.model.step(tokens, self.state)
        if self._graph is None:
            self._capture(len(tokens))
        assert self._graph is not None and self._tokens is not None and self._logits is not None
        self._tokens.copy_(tokens, non_blocking=True)
        self._graph.replay()
        return self._logits.clone()  # the next replay writes the same memory

    def _capture(self, sequences: int) -> None:
        """Capture the model's step; the state stays as it is."""
        device = self.model.device
        self._tokens = torch.zeros(sequences, dtype=torch.int64, device=device)
        tensors = _tensors(self.state)
        before = [tensor.clone() for tensor in tensors]
        with torch.cuda.device(device):
            aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    self.model.step(self._tokens, self.state)
            torch.cuda.current_stream(device).wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits = self.model.step(self._tokens, self.state)
        for tensor, now, value in zip(tensors, _tensors(self.state), before, strict=True):
            assert tensor.data_ptr() == now.data_ptr(), "a step that replaces its state cannot be captured"
            tensor.copy_(value)
        self._graph = graph


def _tensors(state: Any) -> list[torch.Tensor]:
    """The tensors of every block's state."""
    return [tensor for of_block in state for tensor in (of_block.conv, of_block.ssm)]
