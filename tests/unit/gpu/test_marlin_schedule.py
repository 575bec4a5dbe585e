"""The Marlin MoE scheduler's model: no launch leaves its buffers, and what would be is seen.

That the model is what a release does, tests/patches/test_marlin_kernel.py shows on its own text.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.gpu.reference.marlin_kernel import (
    BLOCKS_PER_SM,
    LARGE_BATCH,
    SMALL_BATCH,
    Kernel,
    c_tmp_size,
    reduce_end,
)
from tests.gpu.reference.marlin_schedule import (
    Launch,
    Part,
    Schedule,
    locks_used,
    schedule,
)
from tests.support.marlin_host import (
    LAUNCH_SLACK,
    cache_size,
    faults,
    layout_size,
    least_workspace,
)

BLOCKS = (8, 16, 32, 48, 64)
GROUPS = (-1, 16, 32, 64, 128)
# Columns as narrow as a tile can be: the buffers are then the tightest that vLLM allows.
TILE = SMALL_BATCH[2]


def wrong(launch: Launch, sms: int, parts: Schedule | None = None) -> list[str]:
    """Faults with the smallest buffers that vLLM allows: no id beyond the padded tokens."""
    sizes = (launch.kernel, launch.size_n, launch.tokens, sms)
    return faults(
        launch,
        schedule(launch) if parts is None else parts,
        workspace=least_workspace(*sizes),
        c_tmp=c_tmp_size(*sizes),
    )


def launch_of(
    tiles: int, k_tiles: int, grid: int, *, group: int = -1, block: int = 8, columns: int = 1
) -> Launch:
    kernel = Kernel(config=TILE, block=block, group_size=group)
    assert tiles % columns == 0
    return Launch(
        kernel=kernel,
        size_n=TILE.n * columns,
        size_k=TILE.k * k_tiles,
        tokens=block * tiles // columns,
        grid=grid,
    )


def fewest_sms(grid: int) -> int:
    """The fewest multiprocessors that can have a grid, which makes the buffers smallest."""
    return -(-grid // BLOCKS_PER_SM)


# --- right schedules ------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", range(1, 17))
def test_every_small_launch_is_right(grid: int) -> None:
    """All numbers of tiles up to three rounds of the grid, by up to 12 tiles along K.

    With groups of one, two and four tiles: a stripe starts with a group.
    """
    split = 0
    for tiles, k_tiles, group in itertools.product(range(1, 3 * grid + 1), range(1, 13), (1, 2, 4)):
        if k_tiles % group:
            continue
        launch = launch_of(tiles, k_tiles, grid, group=group * TILE.k)
        parts = schedule(launch)
        assert wrong(launch, fewest_sms(grid), parts) == [], launch
        assert {part.row % group for block in parts for part in block} == {0}
        split += locks_used(parts) > 0
    assert split > 0 or grid == 1


@st.composite
def launches(draw: st.DrawFn) -> tuple[Launch, int]:
    """A launch that vLLM may make, and the multiprocessors of its GPU."""
    block = draw(st.sampled_from(BLOCKS))
    config = draw(st.sampled_from(LARGE_BATCH if block > 16 else SMALL_BATCH))
    group = draw(st.sampled_from(GROUPS))
    size_k = config.k * draw(st.integers(1, 64))
    assume(group == -1 or size_k % group == 0)
    sms = draw(st.sampled_from((48, 84, 132, 148, 170, 188)))
    launch = Launch(
        kernel=Kernel(
            config=config,
            block=block,
            group_size=group,
            activation_bytes=draw(st.sampled_from((1, 2))) if block > 8 else 2,
        ),
        size_n=config.n * draw(st.integers(1, 64)),
        size_k=size_k,
        tokens=block * draw(st.integers(1, 60)),
        grid=sms * draw(st.integers(1, BLOCKS_PER_SM)),
    )
    return launch, sms


@given(launches())
@settings(max_examples=60, deadline=None)
def test_any_launch_is_right(case: tuple[Launch, int]) -> None:
    launch, sms = case
    assert wrong(launch, sms) == []
    # What vLLM's experts allocate is never less than what the kernel insists on.
    sizes = (launch.kernel, launch.size_n, launch.tokens, sms)
    assert locks_used(schedule(launch)) <= least_workspace(*sizes) <= BLOCKS_PER_SM * sms


def test_the_example_of_pull_request_36889() -> None:
    """RTX A6000, one token, w2 of Qwen3.5-35B-A3B: 168 blocks, 160 tiles, and no tile is split."""
    kernel = Kernel(config=SMALL_BATCH[0], block=8, group_size=128)
    launch = Launch(kernel=kernel, size_n=2560, size_k=512, tokens=64, grid=168)
    assert launch.tiles == 160
    assert locks_used(schedule(launch)) == 0
    buffer = c_tmp_size(kernel, 2560, 64, 84)
    assert buffer == 4 * 81_920
    assert reduce_end(kernel, 159) == 4 * (159 * 512 + 64 * 6 + 64) < buffer


def test_c_tmp_can_be_just_large_enough() -> None:
    """So the bound above is no accident of buffers that are far too large."""
    launch = launch_of(20, 8, 32, block=16, columns=10)
    parts = schedule(launch)
    buffer = c_tmp_size(launch.kernel, launch.size_n, launch.tokens, 32)
    assert reduce_end(launch.kernel, locks_used(parts) - 1) == buffer
    assert faults(launch, parts, workspace=20, c_tmp=buffer) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size_n": 100}, "size_n is 100, not a multiple of 64"),
        ({"size_k": 64}, "size_k is 64, not a multiple of 128"),
        ({"tokens": 12}, "tokens is 12, not a multiple of 8"),
        ({"grid": 0}, "grid is 0"),
    ],
)
def test_an_impossible_launch_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(launch_of(2, 2, 2), **changed)


# --- planted faults -------------------------------------------------------------------------------

SPLIT = launch_of(20, 8, 32)


def test_a_workspace_too_small_by_one_lock_is_seen() -> None:
    used = locks_used(schedule(SPLIT))
    assert used == 20
    plenty = c_tmp_size(SPLIT.kernel, SPLIT.size_n, SPLIT.tokens, 32) * 99
    assert faults(SPLIT, schedule(SPLIT), workspace=used, c_tmp=plenty) == []
    assert faults(SPLIT, schedule(SPLIT), workspace=used - 1, c_tmp=plenty) == [
        "locks 0 to 19, the workspace has 19"
    ]


def test_a_c_tmp_too_small_by_one_float_is_seen() -> None:
    end = reduce_end(SPLIT.kernel, locks_used(schedule(SPLIT)) - 1)
    assert faults(SPLIT, schedule(SPLIT), workspace=99, c_tmp=end) == []
    assert faults(SPLIT, schedule(SPLIT), workspace=99, c_tmp=end - 1) == [
        f"c_tmp is used up to float {end}, it has {end - 1}"
    ]


def change(parts: Schedule, block: int, number: int, other: Part | None) -> Schedule:
    """A schedule in which one part is another, or missing."""
    kept = list(parts[block])
    kept[number : number + 1] = [] if other is None else [other]
    return (*parts[:block], tuple(kept), *parts[block + 1 :])


@given(
    case=launches(),
    data=st.data(),
    field=st.sampled_from(("tile", "row", "rows", "count", "index", "lock", "missing")),
    by=st.sampled_from((-1, 1)),
)
@settings(max_examples=150, deadline=None)
def test_any_changed_part_is_seen(
    case: tuple[Launch, int], data: st.DataObject, field: str, by: int
) -> None:
    """Every part of every schedule matters, so a wrong partition cannot pass for a right one."""
    launch, sms = case
    parts = schedule(launch)
    block = data.draw(st.sampled_from([n for n, own in enumerate(parts) if own]))
    number = data.draw(st.integers(0, len(parts[block]) - 1))
    part = parts[block][number]
    assume(field != "lock" or part.count > 1)
    other = None if field == "missing" else replace(part, **{field: getattr(part, field) + by})
    assert wrong(launch, sms, change(parts, block, number, other)) != []


def test_two_tiles_under_one_lock_are_seen() -> None:
    """Each tile is right by itself, and the locks are within the workspace."""
    parts = tuple(
        tuple(replace(part, lock=part.lock // 2) for part in block) for block in schedule(SPLIT)
    )
    found = wrong(SPLIT, 32, parts)
    assert "tile 1: lock 0 is tile 0's" in found
    assert len(found) == 10


def test_a_fixed_stripe_length_is_seen() -> None:
    """Stripes one tile shorter than the kernel's leave the last tiles to nobody."""
    parts = tuple(
        tuple(replace(part, rows=part.rows - 1) for part in block if part.rows > 1)
        for block in schedule(SPLIT)
    )
    assert any("computed by no block" in what for what in wrong(SPLIT, 32, parts))


# --- shared memory --------------------------------------------------------------------------------


def kernels(activation_bytes: int, scale_bytes: int) -> list[Kernel]:
    return [
        Kernel(
            config=config,
            block=block,
            group_size=group,
            weight_bits=bits,
            activation_bytes=activation_bytes,
            scale_bytes=scale_bytes,
            zero_points=zeros,
        )
        for block, group, bits, zeros in itertools.product(BLOCKS, GROUPS, (4, 8), (False, True))
        for config in (LARGE_BATCH if block > 16 else SMALL_BATCH)
        if block > 8 or activation_bytes == 2
    ]


@pytest.mark.parametrize("scale_bytes", [1, 2])
def test_the_host_counts_enough_for_16_bit_activations(scale_bytes: int) -> None:
    assert all(layout_size(k) <= cache_size(k) for k in kernels(2, scale_bytes))


def test_the_host_counts_a_float_per_row_too_little_for_8_bit_activations() -> None:
    """And has room for it all the same, because it launches with more than it counts."""
    for kernel in kernels(1, 2):
        assert layout_size(kernel) - cache_size(kernel) == 4 * 16 * kernel.m_blocks
        assert layout_size(kernel) <= cache_size(kernel) + LAUNCH_SLACK
