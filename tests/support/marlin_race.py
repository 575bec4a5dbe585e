"""Which test sees which fault of the Marlin MoE kernel's cross-block sum.

:class:`~tests.support.marlin_protocol.Fault` is what a build or a caller may do wrong,
:class:`Detector` what a test on a GPU can look at. A detector that no fault sets off is worth
nothing, one that the right protocol sets off is a false alarm; :func:`experiment` tells.
"""

from __future__ import annotations

import math
import random
import struct
from enum import Enum
from typing import TYPE_CHECKING

from tests.gpu.reference.marlin_kernel import SMALL_BATCH, Kernel
from tests.gpu.reference.marlin_schedule import Launch, schedule
from tests.support.marlin_protocol import (
    POISON,
    Fault,
    HangError,
    Memory,
    Stream,
    float32,
    run,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

REPEATS = 100
GRIDS = (13, 17, 27)  # the first is repeated, the others cut the same sums at other places


class Detector(Enum):
    """What a test can see."""

    BITWISE = "launches of the same input differ"
    REFERENCE = "a result is farther from the exact sum than rounding allows"
    WORKSPACE = "the workspace is not zero after a launch"
    RED_ZONE = "the memory after a buffer has changed"
    HANG = "a launch does not end"
    PARTITION = "another partition of the same sums differs by more than rounding allows"


def example(grid: int) -> Launch:
    """A small launch with tiles in several parts, for each of GRIDS."""
    kernel = Kernel(config=SMALL_BATCH[0], block=8, group_size=128)
    return Launch(kernel=kernel, size_n=512, size_k=1024, tokens=40, grid=grid)


def experiment(fault: Fault | None, *, streams: int = 1) -> frozenset[Detector]:
    """The detectors that a fault sets off; without one there must be none.

    Args:
        fault: what is planted.
        streams: launches at a time, each with its own buffers; SHARED_WORKSPACE makes it two
            with the same.
    """
    launch = example(GRIDS[0])
    parts, products = schedule(launch), _products(launch)
    found: set[Detector] = set()
    first: list[float] = []
    kept: list[list[int]] = []
    for repeat in range(REPEATS):
        memories = _memories(launch, fault, streams, kept)
        if fault is Fault.DIRTY_WORKSPACE and repeat == 0:
            memories[0].locks[3] = 1
        running = [Stream(parts=parts, products=products, memory=one) for one in memories]
        try:
            run(running, repeat)
        except HangError:
            found.add(Detector.HANG)
            kept = []  # the process is killed, its workspace is gone
            continue
        kept = [memory.locks for memory in memories]
        for memory in memories:
            found |= _seen(memory)
        for stream in running:
            first = first or stream.result
            if _bits(stream.result) != _bits(first):
                found.add(Detector.BITWISE)
            if not _near(products, stream.result, list(map(math.fsum, products)), 1):
                found.add(Detector.REFERENCE)
    return frozenset(found | _partitions(fault, products, first))


def _products(launch: Launch) -> list[list[float]]:
    rng = random.Random(0)  # noqa: S311 - a fixed input
    return [[float32(rng.gauss(0, 1)) for _ in range(launch.k_tiles)] for _ in range(launch.tiles)]


def _memories(
    launch: Launch, fault: Fault | None, streams: int, kept: Sequence[list[int]]
) -> list[Memory]:
    """A new ``c_tmp`` for each stream; the workspace of the launch before, as a layer keeps it."""
    faults = frozenset() if fault is None else frozenset({fault})
    own = 1 if fault is Fault.SHARED_WORKSPACE else streams
    memories = [
        Memory(size=launch.grid, faults=faults, locks=kept[number] if kept else [])
        for number in range(own)
    ]
    return memories * 2 if fault is Fault.SHARED_WORKSPACE else memories


def _partitions(
    fault: Fault | None, products: Sequence[Sequence[float]], first: Sequence[float]
) -> set[Detector]:
    """Cut the same sums at other places."""
    found: set[Detector] = set()
    for grid in GRIDS[1:]:
        launch = example(grid)
        memory = _memories(launch, fault, 1, [])[0]
        stream = Stream(parts=schedule(launch), products=products, memory=memory)
        try:
            run([stream], grid)
        except HangError:
            found.add(Detector.HANG)
            continue
        if first and not _near(products, stream.result, first, 2):
            found.add(Detector.PARTITION)
    return found


def _seen(memory: Memory) -> set[Detector]:
    """What the buffers show after a launch."""
    found = set()
    if any(memory.locks[: memory.workspace_end]):
        found.add(Detector.WORKSPACE)
    slots = memory.slots[memory.c_tmp_end :]
    if set(memory.locks[memory.workspace_end :]) != {POISON} or not all(map(math.isnan, slots)):
        found.add(Detector.RED_ZONE)
    return found


def _near(
    products: Sequence[Sequence[float]],
    values: Sequence[float],
    others: Sequence[float],
    sums: int,
) -> bool:
    """Whether values may differ so when ``sums`` of both are float32 sums in any order.

    The usual bound for n terms: ``n * 2**-24`` times the sum of their magnitudes. NaN never may.
    """
    return all(
        abs(value - other) <= sums * len(terms) * 2.0**-24 * math.fsum(map(abs, terms))
        for terms, value, other in zip(products, values, others, strict=True)
    )


def _bits(values: Sequence[float]) -> bytes:
    return struct.pack(f"{len(values)}f", *values)
