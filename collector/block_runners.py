"""Runs blocks and adds them to a run's statistics: on the host, or on a device that continues while rows are made."""

from __future__ import annotations

import gc
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from types import TracebackType

import pyarrow as pa
import torch

from quambase.collector.cuda.counter import choose_counter
from quambase.collector.cuda.gather import choose_gather
from quambase.collector.cuda.transfer import copied_to_host, to_device, to_host
from quambase.collector.documents import TokenizedDocument
from quambase.collector.host.counter import HostCounter
from quambase.collector.statistics import ENCODINGS, BlockStatistics, Counter, RunStatistics
from quambase.collector.taps import NOTHING, BlockRecorder, Gather, KeptTokens, ObservedBlock, TorchGather
from quambase.model.language_model import LanguageModel, floating_model
from quambase.model.operators.choice import choose_device
from quambase.model.packed_batch import Batch
from quambase.model.weights import ModelWeights
from quambase.schema.errors import DataInvalid, UnknownName
from quambase.schema.values.arrays import Float64

DTYPES = {"float16": torch.float16, "float32": torch.float32}

Write = Callable[[int, pa.Table, pa.Table], None]
"""Receives a block's number and its rows of `documents` and `activations`."""

Sums = Callable[[int, Float64], None]
"""Receives a block's number and its `quambase.collector.statistics.BlockStatistics.sums`."""

AHEAD = 2
"""Blocks that may be queued behind the one that the device computes. With many more its queue would be full, and
launches would block.
"""

UNWRITTEN = 4
"""Blocks that may be unwritten while the device continues."""

WRITERS = 3
"""Threads that make rows: those of a block take longer to make than the device takes to compute the block."""


@dataclass(frozen=True)
class Placement:
    """The device that a model runs on, and the dtype of its forward pass: float32 on the CPU, float16 or float32 on
    CUDA.
    """

    device: torch.device
    dtype: str

    def identity(self) -> dict[str, str]:
        """The part of it that determines a run's bytes."""
        return {"device": self.device.type, **({"forward_dtype": self.dtype} if self.device.type != "cpu" else {})}

    def described(self) -> dict[str, str]:
        """What the manifest adds about the machine: the CUDA device's name."""
        return {"cuda": torch.cuda.get_device_name(self.device)} if self.device.type == "cuda" else {}


def choose_placement(device: str = "auto", dtype: str | None = None) -> Placement:
    """The placement that ``--device`` and ``--dtype`` name. By default CUDA if there is a device, in float16, as
    upstream runs the model.

    UnknownName: no such device or dtype; DataInvalid: no CUDA device, or float16 on the CPU.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UnknownName.of("dtype", dtype, DTYPES)
    where = choose_device(device)
    if where.type == "cuda":
        return Placement(where, dtype or "float16")
    if dtype == "float16":
        raise DataInvalid("the CPU runs the model in float32; leave out --dtype float16, or use --device cuda")
    return Placement(where, "float32")


def take_local_device(environment: Mapping[str, str]) -> None:
    """Under torchrun: make this process's own GPU the current one, which `choose_placement` then chooses."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(environment["LOCAL_RANK"]) % torch.cuda.device_count())


@dataclass(frozen=True)
class BlockOutputs:
    """What is made of every block besides the run's statistics: its rows (of the run ``run``) for ``write``, its sums
    for ``sums``. ``kept``: the tokens whose activations are among the rows.
    """

    run: str = ""
    kept: KeptTokens = NOTHING
    write: Write | None = None
    sums: Sums | None = None


NO_OUTPUTS = BlockOutputs()


class BlockRunner(AbstractContextManager["BlockRunner"]):
    """Runs blocks in order and folds each into a run's statistics."""

    def __init__(
        self,
        model: LanguageModel,
        statistics: RunStatistics,
        outputs: BlockOutputs,
        counter: Counter,
        gather: Gather,
    ) -> None:
        self.model, self.outputs, self._statistics = model, outputs, statistics
        self._block = BlockStatistics(statistics)
        self._counter, self._gather = counter, gather

    def _run(self, documents: Sequence[TokenizedDocument]) -> ObservedBlock:
        """Run one block; with the states along its documents if a site has them."""
        every = max((layout.every for layout in self._block.layouts.values()), default=0)
        recorder = BlockRecorder(
            self.outputs.run, documents, self._block, self._counter, self._gather, self.outputs.kept
        )
        self.model.hidden(Batch.join([document.tokens for document in documents], every), recorder)
        return recorder.finish()

    def _write(self, number: int, block: ObservedBlock, sums: torch.Tensor) -> None:
        """Hand over what is made of a block; ``sums``: `quambase.collector.statistics.BlockStatistics.sums`."""
        if self.outputs.sums:
            self.outputs.sums(number, (copied_to_host(sums)[0] if sums.is_cuda else sums).numpy())
        if self.outputs.write:
            self.outputs.write(number, *block.tables())

    @abstractmethod
    def observe(self, number: int, documents: Sequence[TokenizedDocument]) -> None:
        """Run one block. TapNeverFired; whatever ``write`` raises, perhaps at a later block."""

    def settle(self) -> None:
        """Wait until every block so far is observed and its rows are written."""

    @abstractmethod
    def statistics(self) -> RunStatistics:
        """The statistics of all blocks so far, on the host; rows of the last blocks may not be written yet."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release all resources."""


class HostBlockRunner(BlockRunner):
    """Runs blocks on the CPU, one after another."""

    def __init__(self, model: LanguageModel, statistics: RunStatistics, outputs: BlockOutputs) -> None:
        groups = max(len(layout.names) for layout in statistics.index.layouts.values())
        counter = HostCounter(ENCODINGS["float16"], statistics.most, groups)
        super().__init__(model, statistics, outputs, counter, TorchGather(statistics.device))

    def observe(self, number: int, documents: Sequence[TokenizedDocument]) -> None:
        """As `BlockRunner.observe`."""
        block = self._run(documents)
        self._write(number, block, self._block.sums)

    def statistics(self) -> RunStatistics:
        """As `BlockRunner.statistics`."""
        return self._statistics


@cache
def _observing(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's blocks are observed. Its priority is above that of the counter's stream, whose
    kernels use the multiprocessors that the model's leave idle. One for all runners, since PyTorch reuses freed memory
    only on the stream that allocated it.
    """
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


class CudaBlockRunner(BlockRunner):
    """Runs blocks on a device and keeps its queue filled: other threads make and write a block's rows while the device
    computes later blocks.
    """

    def __init__(self, model: LanguageModel, statistics: RunStatistics, outputs: BlockOutputs) -> None:
        counter = choose_counter(ENCODINGS["float16"], statistics.most, model.device)
        gather = choose_gather(model.device, outputs.kept.everything)
        super().__init__(model, to_device(statistics, model.device), outputs, counter, gather)
        self._stream = None
        if model.device.type == "cuda":
            self._stream = _observing(model.device)
            self._stream.wait_stream(torch.cuda.current_stream(model.device))
        self._writer = ThreadPoolExecutor(WRITERS)
        self._observed: deque[tuple[int, ObservedBlock, torch.Tensor]] = deque()
        self._unwritten: deque[Future[None]] = deque()

    def __enter__(self) -> CudaBlockRunner:
        """Exclude existing objects from garbage collection until the end: one pass takes as long as several blocks, and
        the device would idle.
        """
        gc.freeze()
        return self

    @torch.inference_mode()
    def observe(self, number: int, documents: Sequence[TokenizedDocument]) -> None:
        """As `BlockRunner.observe`."""
        with torch.cuda.stream(self._stream):
            block = self._run(documents)
        if self.outputs.write or self.outputs.sums:
            self._observed.append((number, block, self._block.sums))
        self._hand_over(AHEAD)
        self._await_written(UNWRITTEN)

    def _hand_over(self, ahead: int) -> None:
        """Start making the rows of every block that was copied to the host; wait until at most ``ahead`` blocks were
        not.
        """
        while self._observed and (self._observed[0][1].is_here() or len(self._observed) > ahead):
            self._unwritten.append(self._writer.submit(self._write, *self._observed.popleft()))

    def _await_written(self, ahead: int) -> None:
        """Wait until at most ``ahead`` blocks are unwritten."""
        while self._unwritten and len(self._observed) + len(self._unwritten) > ahead:
            self._unwritten.popleft().result()

    def settle(self) -> None:
        """As `BlockRunner.settle`."""
        self._hand_over(0)
        self._await_written(0)

    def statistics(self) -> RunStatistics:
        """As `BlockRunner.statistics`."""
        self._hand_over(0)
        if self._statistics.device.type == "cuda":
            torch.cuda.synchronize(self._statistics.device)
        return to_host(self._statistics)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until all rows are written, unless an error ended the run; raises the errors of writing."""
        gc.unfreeze()
        try:
            if error is None:
                self.settle()
        finally:
            self._writer.shutdown(wait=True, cancel_futures=True)


def new_block_runner(
    weights: ModelWeights,
    where: Placement,
    statistics: RunStatistics,
    outputs: BlockOutputs = NO_OUTPUTS,
) -> BlockRunner:
    """A runner of prepared ``weights`` that adds to ``statistics``. Warns if kernels do not compile."""
    model = floating_model(weights, where.device, DTYPES[where.dtype], rotated=True)
    if where.device.type == "cpu":
        return HostBlockRunner(model, statistics, outputs)
    return CudaBlockRunner(model, statistics, outputs)
