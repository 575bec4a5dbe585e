"""The Marlin MoE kernel's cross-block sum, emulated with weak memory and, if asked, with a fault.

Each thread block runs the parts of its real schedule (:mod:`~tests.gpu.reference.marlin_schedule`)
and the kernel's lock protocol; one step of one block at a time, in random order. Writes to
``c_tmp`` wait in a buffer of the block until a fence, or until some pass it by themselves; reads
may come from a stale copy until the block invalidates it.

Cited: ``inline void barrier_acquire`` at marlin_template.h 0.22.1:185 0.26.0:185 0.33.0:159
Cited: ``inline void barrier_release`` at marlin_template.h 0.22.1:200 0.26.0:200 0.33.0:174
Cited: ``barrier_acquire(&locks`` at marlin_template.h 0.22.1:2164 0.26.0:2164 0.33.0:1922
"""

from __future__ import annotations

import math
import random
import struct
from ctypes import c_float
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from tests.gpu.reference.marlin_schedule import Part, Schedule

POISON = -1  # what a red zone's locks hold; as a float, 0xFF bytes are NaN
RED_ZONE = 64
PATIENCE = 10  # steps without progress, per block, before all blocks are asked in turn


class Fault(Enum):
    """What is planted."""

    NO_FENCE = "release without a fence"
    NO_INVALIDATE = "acquire without invalidating"
    NO_WAIT = "no wait for the lock"
    NO_RESET = "the last part leaves the lock as it is"
    SHARED_WORKSPACE = "two launches at a time share workspace and c_tmp"
    SMALL_WORKSPACE = "locks lie past the workspace's end"
    ALIASED_LOCKS = "two tiles use one lock"
    SMALL_C_TMP = "slots lie past the end of c_tmp"
    ALIASED_C_TMP = "two tiles use one slot of c_tmp"
    DIRTY_WORKSPACE = "a lock is not zero on entry"
    HALF_REDUCE = "partial sums are kept in 16 bits"


class HangError(Exception):
    """No block of the launches can go on."""


@dataclass(kw_only=True)
class Memory:
    """Workspace and ``c_tmp`` of a launch, each with a red zone, and what blocks hold of them.

    Attributes:
        size: locks and slots that the launch needs.
        faults: what is planted.
        locks: the workspace; None for a new one.
        slots: ``c_tmp``, one float per slot, never initialized.
        pending: writes of each block that others do not see yet, oldest first.
        stale: copies that a block may read instead of the memory.
    """

    size: int
    faults: frozenset[Fault]
    locks: list[int] = field(default_factory=list)
    slots: list[float] = field(init=False)
    pending: dict[object, list[tuple[int, float]]] = field(default_factory=dict)
    stale: dict[object, dict[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.locks:
            end = self.workspace_end
            self.locks = [0] * end + [POISON] * (self.size + RED_ZONE - end)
        self.slots = [math.nan] * (self.size + RED_ZONE)

    @property
    def workspace_end(self) -> int:
        """Where the red zone of the workspace begins."""
        return self.size // 8 if Fault.SMALL_WORKSPACE in self.faults else self.size

    @property
    def c_tmp_end(self) -> int:
        """Where the red zone of ``c_tmp`` begins."""
        return self.size // 8 if Fault.SMALL_C_TMP in self.faults else self.size

    def lock(self, part: Part) -> int:
        """Index of the part's lock."""
        return part.lock % (self.size // 4) if Fault.ALIASED_LOCKS in self.faults else part.lock

    def slot(self, part: Part) -> int:
        """Index of the part's slot."""
        return part.lock % (self.size // 4) if Fault.ALIASED_C_TMP in self.faults else part.lock

    def write(self, who: object, slot: int, value: float) -> None:
        """Put a write where only its block sees it."""
        self.pending.setdefault(who, []).append((slot, value))

    def publish(self, who: object, count: int | None = None) -> None:
        """Let others see the oldest writes of a block; all of them by default."""
        waiting = self.pending.get(who, [])
        for slot, value in waiting[:count]:
            self.slots[slot] = value
        self.pending[who] = [] if count is None else waiting[count:]

    def read(self, who: object, slot: int) -> float:
        """A block's own latest write, else its stale copy, else the memory."""
        for written, value in reversed(self.pending.get(who, [])):
            if written == slot:
                return value
        return self.stale.get(who, {}).get(slot, self.slots[slot])

    def copy(self, who: object, slot: int) -> None:
        """Let a block keep what a slot holds now."""
        self.stale.setdefault(who, {})[slot] = self.slots[slot]


@dataclass(kw_only=True)
class Stream:
    """One launch among those that run at a time.

    Attributes:
        parts: its schedule.
        products: for each tile the terms along K, float32.
        memory: its buffers.
        result: each tile's sum, NaN until it is written.
    """

    parts: Schedule
    products: Sequence[Sequence[float]]
    memory: Memory
    result: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.result = [math.nan] * len(self.products)


def run(streams: Sequence[Stream], seed: int) -> None:
    """Run launches side by side, their blocks' steps in random order.

    Raises:
        HangError: they do not end.
    """
    rng = random.Random(seed)  # noqa: S311 - an order that can be repeated
    live = [
        _block(stream, (number, block), rng)
        for number, stream in enumerate(streams)
        for block in range(len(stream.parts))
    ]
    waited = 0
    while live:
        # By chance, or because nobody can go on?
        everyone = waited > PATIENCE * len(live)
        moved = False
        for block in list(live) if everyone else [live[rng.randrange(len(live))]]:
            try:
                moved |= next(block)
            except StopIteration:
                live.remove(block)
                moved = True
        if everyone and not moved:
            raise HangError
        waited = 0 if moved else waited + 1


def _block(stream: Stream, who: tuple[int, int], rng: random.Random) -> Generator[bool]:
    """A thread block; True after a step, False when it could only wait."""
    memory, planted = stream.memory, stream.memory.faults
    for part in stream.parts[who[1]]:
        total = 0.0
        for product in stream.products[part.tile][part.row : part.row + part.rows]:
            total = float32(total + product)
        yield True
        last = part.index == part.count - 1
        if part.count > 1:
            lock, slot = memory.lock(part), memory.slot(part)
            if Fault.NO_INVALIDATE in planted:
                memory.copy(who, slot)
                yield True
            while Fault.NO_WAIT not in planted and memory.locks[lock] != part.index:
                yield False
            if part.index > 0:
                total = float32(total + memory.read(who, slot))
            yield True
            if not last:
                memory.write(who, slot, _float16(total) if Fault.HALF_REDUCE in planted else total)
                yield True
                if Fault.NO_FENCE not in planted:
                    memory.publish(who)
                memory.locks[lock] += 1
                yield True
                memory.publish(who, rng.randint(0, 1))
            elif Fault.NO_RESET not in planted:
                memory.locks[lock] = 0
        if last:
            stream.result[part.tile] = total
        yield True
    memory.publish(who)


def float32(value: float) -> float:
    """Round to float32."""
    return c_float(value).value


def _float16(value: float) -> float:
    rounded: float = struct.unpack("e", struct.pack("e", value))[0]
    return rounded
