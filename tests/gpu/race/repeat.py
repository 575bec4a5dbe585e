"""Launch again and again, and count on the GPU which results differ and which leave a lock.

Nothing waits for the host between launches; each result is checked by a kernel behind it, which
then makes it NaN. Two inputs take turns (see Case).
"""

from __future__ import annotations

import ctypes
import itertools
import time
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

import torch

from tests.gpu.race.case import Case, Options, stream, to_gpu, wait

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


PER_GRAPH = 16  # launches in a graph, even: the inputs take turns
PER_WAIT = 64  # launches or graphs between two looks at the clock


class Mode(Enum):
    """What goes on around the launches."""

    EAGER = "one by one"
    GRAPH = "from a CUDA graph"
    GRAPH_L2 = "from a graph, the L2 cache swept between replays"
    GRAPH_NOISE = "from a graph, a second stream computes at the same time"
    GRAPH_CHURN = "from a graph, memory taken and given back and other launches between replays"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When to stop: after ``seconds``, or if ``launches`` is set after so many."""

    seconds: float
    launches: int | None = None

    def left(self, started: float, done: int) -> bool:
        if self.launches is not None:
            return done < self.launches
        return time.monotonic() - started < self.seconds


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Launches; those with another result than the first; those after which a lock was set."""

    launches: int
    differ: int
    dirty: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            launches=self.launches + other.launches,
            differ=self.differ + other.differ,
            dirty=self.dirty + other.dirty,
        )


class Tools:
    """The native library."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))

    def check(
        self, result: torch.Tensor, first: torch.Tensor, locks: torch.Tensor, found: torch.Tensor
    ) -> None:
        """Compare, count, and make the result NaN, on the current stream."""
        error = self.library.check_launch(
            ctypes.c_void_p(result.data_ptr()),
            ctypes.c_void_p(first.data_ptr()),
            ctypes.c_long(result.numel() * result.element_size()),
            ctypes.c_void_p(locks.data_ptr()),
            locks.numel(),
            ctypes.c_void_p(found.data_ptr()),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        if error:
            raise RuntimeError(f"check_launch: CUDA error {error}")


class Repeater:
    """Launches of one case with its own counters; ``inputs``, 1 or 2, take turns."""

    def __init__(
        self, case: Case, tools: Tools, *, inputs: int = 2, options: Options | None = None
    ) -> None:
        self.case, self.tools, self.options = case, tools, options
        self.turns = itertools.cycle(range(inputs))
        self.first = [
            case.launch(which, out=case.new_output(), options=options) for which in range(inputs)
        ]
        wait()
        self.found = torch.zeros(3, dtype=torch.int64, device="cuda")

    def step(self) -> None:
        """One launch and its check, on the current stream."""
        which = next(self.turns)
        out = self.case.launch(which, options=self.options)
        self.tools.check(out, self.first[which], self.case.workspace, self.found)

    def capture(self) -> torch.cuda.CUDAGraph:
        """A graph of PER_GRAPH steps."""
        with torch.cuda.stream(stream("capture")):
            for _ in range(2):
                self.step()
        wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(PER_GRAPH):
                self.step()
        return graph

    @property
    def counts(self) -> Counts:
        """What was counted until now; waits for the GPU."""
        wait()
        launches, differ, dirty = self.found.tolist()
        return Counts(launches=launches, differ=differ, dirty=dirty)


def repeat(case: Case, tools: Tools, mode: Mode, budget: Budget) -> Counts:
    """Launch a case until the budget is spent or something was found."""
    repeater = Repeater(case, tools)
    around = _around(mode, case)
    run, per_run = repeater.step, 1
    if mode is not Mode.EAGER:
        run, per_run = repeater.capture().replay, PER_GRAPH
    started, done = time.monotonic(), 0
    while budget.left(started, done):
        for _ in range(max(1, PER_WAIT // per_run)):
            around()
            run()
            done += per_run
        counts = repeater.counts
        if counts.differ or counts.dirty:
            break
    return repeater.counts


def _around(mode: Mode, case: Case) -> Callable[[], object]:
    """What is done before each run."""
    if mode is Mode.GRAPH_L2:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        sweep = torch.zeros(int(1.5 * cache), dtype=torch.uint8, device="cuda")
        return partial(sweep.add_, 1)
    if mode is Mode.GRAPH_NOISE:
        side = stream("noise")
        square = torch.full((2048, 2048), 0.01, dtype=torch.bfloat16, device="cuda")

        def compute() -> None:
            with torch.cuda.stream(side):
                square @ square

        return compute
    if mode is Mode.GRAPH_CHURN:
        return _churn(case)
    return lambda: None


def _churn(case: Case) -> Callable[[], None]:
    """Take memory in the sizes of an op's buffers and give it back, as a larger batch does."""
    numbers = itertools.count(1)

    def take() -> None:
        number = next(numbers)
        size = (1 << 16) * (1 + number % 37)
        kept = [torch.full((size,), float("nan"), device="cuda") for _ in range(3)]
        del kept
        case.launch(number % 2, out=case.new_output())

    return take


def two_streams(cases: list[Case], tools: Tools, budget: Budget, *, shared: bool) -> Counts:
    """Graphs of two cases on two streams at a time, with one workspace or each with its own."""
    repeaters = [Repeater(case, tools) for case in cases]
    if shared:
        cases[1].workspace = cases[0].workspace
    graphs = [repeater.capture() for repeater in repeaters]
    streams = [stream(f"launches {number}") for number, _ in enumerate(cases)]
    wait()
    started, done = time.monotonic(), 0
    while budget.left(started, done):
        for _ in range(4):
            for one, graph in zip(streams, graphs, strict=True):
                with torch.cuda.stream(one):
                    graph.replay()
            done += PER_GRAPH * len(cases)
        counts = [repeater.counts for repeater in repeaters]
        if any(count.differ or count.dirty for count in counts):
            break
    first, second = (repeater.counts for repeater in repeaters)
    return first + second


def micro_inputs(tiles: int, parts: int, k: int, n: int) -> dict[str, torch.Tensor]:
    """Buffers of tools.cu's model kernel."""
    generator = torch.Generator().manual_seed(5)
    return {
        "a": torch.randn(k, generator=generator).cuda(),
        "w": torch.randn(tiles, k, n, generator=generator).cuda(),
        "out": torch.full((tiles, n), float("nan")).cuda(),
        "slots": torch.full((tiles, n), float("nan")).cuda(),
        "locks": to_gpu(torch.zeros(tiles, dtype=torch.int32).numpy(), "int32"),
        "hung": to_gpu(torch.zeros(1, dtype=torch.int32).numpy(), "int32"),
    }
