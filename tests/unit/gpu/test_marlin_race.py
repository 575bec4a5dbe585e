"""The kill matrix: which detector sees which fault; the right protocol sets off none."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest

from tests.gpu.reference import marlin_schedule
from tests.gpu.reference.marlin_kernel import SMALL_BATCH
from tests.gpu.reference.marlin_schedule import locks_used, schedule
from tests.support.marlin_protocol import Fault, HangError, Memory, Stream, run
from tests.support.marlin_race import GRIDS, Detector, example, experiment

REFERENCE = Path(marlin_schedule.__file__).parent

# Rows in the order of Fault, columns in the order of Detector.
MATRIX = """
                 bitwise reference workspace red_zone hang partition
NO_FENCE            X        X         .        .      .       X
NO_INVALIDATE       X        X         .        .      .       X
NO_WAIT             X        X         X        .      .       X
NO_RESET            .        .         X        .      X       .
SHARED_WORKSPACE    X        X         X        .      X       X
SMALL_WORKSPACE     .        .         .        .      X       .
ALIASED_LOCKS       X        X         X        .      X       .
SMALL_C_TMP         .        .         .        X      .       .
ALIASED_C_TMP       X        X         .        .      .       X
DIRTY_WORKSPACE     .        X         X        .      .       X
HALF_REDUCE         .        X         .        .      .       X
"""


def expected() -> dict[Fault, frozenset[Detector]]:
    head, *rows = (row.split() for row in MATRIX.strip().splitlines())
    assert head == [detector.name.lower() for detector in Detector]
    return {
        Fault[name]: frozenset(
            detector for detector, mark in zip(Detector, marks, strict=True) if mark == "X"
        )
        for name, *marks in rows
    }


@pytest.mark.parametrize("fault", Fault)
def test_a_fault_is_seen_by_these_detectors_and_no_others(fault: Fault) -> None:
    assert experiment(fault) == expected()[fault]


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_the_right_protocol_sets_off_nothing(streams: int) -> None:
    """Also with launches at a time, each with its own workspace."""
    assert experiment(None, streams=streams) == frozenset()


def test_every_fault_is_seen_and_every_detector_is_needed() -> None:
    matrix = expected()
    assert set(matrix) == set(Fault)
    assert len(matrix) == 11
    assert all(matrix.values())
    for detector in Detector:
        assert any(detector in seen for seen in matrix.values())
    only = {next(iter(seen)) for seen in matrix.values() if len(seen) == 1}
    assert {Detector.HANG, Detector.RED_ZONE} <= only


def test_the_example_splits_tiles_in_each_of_its_partitions() -> None:
    kept = [schedule(example(grid)) for grid in GRIDS]
    assert all(locks_used(parts) > 4 for parts in kept)
    assert len({tuple(part.row for block in parts for part in block) for parts in kept}) == 3
    assert example(GRIDS[0]).kernel.config == SMALL_BATCH[0]


def test_a_launch_that_cannot_end_is_said_to_hang() -> None:
    """A lock that no part ever waits for: deterministic, without a limit on time."""
    launch = example(GRIDS[0])
    memory = Memory(size=launch.grid, faults=frozenset(), locks=[7] * 99)
    products = [[1.0] * launch.k_tiles] * launch.tiles
    with pytest.raises(HangError):
        run([Stream(parts=schedule(launch), products=products, memory=memory)], 0)


def test_a_seed_repeats_a_run() -> None:
    launch = example(GRIDS[1])
    products = [[1.0 / (3 + k) for k in range(launch.k_tiles)]] * launch.tiles
    results = []
    for seed in (1, 1, 2):
        memory = Memory(size=launch.grid, faults=frozenset({Fault.NO_WAIT}))
        stream = Stream(parts=schedule(launch), products=products, memory=memory)
        run([stream], seed)
        results.append(repr(stream.result))
    assert results[0] == results[1] != results[2]


def test_a_write_is_its_blocks_own_until_it_is_published() -> None:
    memory = Memory(size=8, faults=frozenset())
    for slot, value in ((1, 10.0), (2, 20.0), (1, 11.0)):
        memory.write("one", slot, value)
    assert [memory.read("one", slot) for slot in (1, 2)] == [11.0, 20.0]
    assert math.isnan(memory.read("two", 1))
    memory.publish("one", 1)
    assert memory.read("two", 1) == 10.0
    assert math.isnan(memory.read("two", 2))
    memory.publish("one")
    assert [memory.read("two", slot) for slot in (1, 2)] == [11.0, 20.0]


def test_a_copy_hides_what_comes_after_it() -> None:
    memory = Memory(size=8, faults=frozenset())
    memory.copy("two", 1)
    memory.write("one", 1, 10.0)
    memory.publish("one")
    assert math.isnan(memory.read("two", 1))
    assert memory.read("three", 1) == 10.0


@pytest.mark.parametrize("name", ["kernel", "schedule"])
def test_the_models_need_no_library(name: str) -> None:
    """They also run inside an image and on a GPU host, which have no other project code."""
    path = REFERENCE / f"marlin_{name}.py"
    allowed = {"tests", "__future__", "collections", "ctypes", "dataclasses", "enum"}
    allowed |= {"math", "random", "struct", "typing"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            room = node.module.split(".")
            assert room[0] in allowed
            assert room[0] != "tests" or room[:3] == ["tests", "gpu", "reference"]
