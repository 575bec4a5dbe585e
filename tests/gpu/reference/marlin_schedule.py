"""Which thread block of a Marlin MoE launch computes which part of which tile, and under what lock.

Tiles are cut along K into stripes of equal length, one per thread block, so that a tile may have
parts in several blocks. These add their sums one after the other, bottom part first, through
``c_tmp`` and a counter in ``workspace`` (vLLM's pull request 24722: whole tiles first, then at
least one tile per block in stripes).

Standard library only. The contract tests compile the release's own text and compare with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.gpu.reference.marlin_kernel import Kernel, ceil_div

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch.

    Attributes:
        kernel: the template's instance.
        size_n: columns of the output, a multiple of the tile's.
        size_k: length of the sums, a multiple of the tile's.
        tokens: ``num_tokens_past_padded``, rows of all experts, a multiple of the kernel's block.
        grid: thread blocks: multiprocessors times blocks per multiprocessor.

    Raises:
        ValueError: a size is not such a multiple; vLLM refuses to launch it.
    """

    kernel: Kernel
    size_n: int
    size_k: int
    tokens: int
    grid: int

    def __post_init__(self) -> None:
        config = self.kernel.config
        for name, value, unit in (
            ("size_n", self.size_n, config.n),
            ("size_k", self.size_k, config.k),
            ("tokens", self.tokens, self.kernel.block),
            ("grid", self.grid, 1),
        ):
            if value < unit or value % unit:
                raise ValueError(f"{name} is {value}, not a multiple of {unit}")

    @property
    def k_tiles(self) -> int:
        """Tiles along K, the unit of a stripe's length."""
        return self.size_k // self.kernel.config.k

    @property
    def tiles(self) -> int:
        """Tiles of the output."""
        return self.tokens // self.kernel.block * (self.size_n // self.kernel.config.n)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A block's part of a tile.

    Attributes:
        block: the thread block.
        tile: the output tile: expert block times column tiles, plus column tile.
        row: first tile along K.
        rows: tiles along K.
        count: parts that the tile has.
        index: which of them this one is; 0 is the bottom one, which starts the sum.
        lock: index of the tile's lock and of its slot in ``c_tmp``; unused when count is 1.
    """

    block: int
    tile: int
    row: int
    rows: int
    count: int
    index: int
    lock: int


Schedule = tuple[tuple[Part, ...], ...]
"""The parts of each thread block, in the order in which it computes them."""


def schedule(launch: Launch) -> Schedule:
    """The kernel's partition of a launch."""
    stripes = _Stripes.of(launch)
    return tuple(
        (*_whole_tiles(stripes, block), *_striped_tiles(stripes, block))
        for block in range(launch.grid)
    )


@dataclass(frozen=True, kw_only=True)
class _Stripes:
    """The launch, divided.

    Attributes:
        grid: thread blocks.
        k_tiles: tiles along K.
        whole: tiles that are computed whole, the first ones.
        tiles: tiles in stripes.
        length: of a stripe, in tiles along K.
    """

    grid: int
    k_tiles: int
    whole: int
    tiles: int
    length: int

    @classmethod
    def of(cls, launch: Launch) -> _Stripes:
        """Divide a launch.

        Cited: ``part2_mn_tiles * 3 <=`` at marlin_template.h 0.22.1:402 0.26.0:402 0.33.0:373
        Cited: ``int iters = div_ceil`` at marlin_template.h 0.22.1:406 0.26.0:406 0.33.0:377
        """
        grid, tiles = launch.grid, launch.tiles
        if tiles > grid:
            tiles %= grid
            if tiles * 3 <= grid:
                tiles += grid
        length = ceil_div(launch.k_tiles * tiles, grid)
        group, k = launch.kernel.group_size, launch.kernel.config.k
        if group >= k:  # a stripe must not start within a group
            length = ceil_div(length, group // k) * (group // k)
        return cls(
            grid=grid,
            k_tiles=launch.k_tiles,
            whole=launch.tiles - tiles,
            tiles=tiles,
            length=length,
        )


def _first_lock(stripes: _Stripes, block: int) -> int:
    """The lock before the block's first part.

    Cited: ``locks_off = blockIdx.x`` at marlin_template.h 0.22.1:458 0.26.0:458 0.33.0:429
    """
    if stripes.tiles >= stripes.grid:
        return block
    return stripes.length * block // stripes.k_tiles - 1


def _whole_tiles(stripes: _Stripes, block: int) -> Iterator[Part]:
    """Cited: ``auto init_part1_slice`` at marlin_template.h 0.22.1:630 0.26.0:630 0.33.0:598."""
    lock = _first_lock(stripes, block)
    for tile in range(block, stripes.whole, stripes.grid):
        yield Part(block=block, tile=tile, row=0, rows=stripes.k_tiles, count=1, index=0, lock=lock)


def _striped_tiles(stripes: _Stripes, block: int) -> Iterator[Part]:
    """Cited: ``auto init_part2_slice`` at marlin_template.h 0.22.1:567 0.26.0:567 0.33.0:535."""
    length, k_tiles = stripes.length, stripes.k_tiles
    start, end = length * block, min(length * (block + 1), k_tiles * stripes.tiles)
    lock = _first_lock(stripes, block)
    while start < end:
        tile, row = divmod(start, k_tiles)
        rows = min(end - start, k_tiles - row)
        count, index = _share(tile, block, length, k_tiles)
        if stripes.tiles < stripes.grid or (count > 1 and index == count - 1):
            lock += 1
        yield Part(
            block=block,
            tile=stripes.whole + tile,
            row=row,
            rows=rows,
            count=count,
            index=index,
            lock=lock,
        )
        start += rows


def _share(tile: int, block: int, length: int, k_tiles: int) -> tuple[int, int]:
    """How many parts a tile has, and which of them the block's is.

    The kernel's own arithmetic, step by step: that it agrees with what blocks really compute is
    for tests to say.
    """
    first = length * ceil_div(k_tiles * tile, length)  # where a stripe starts at or after the tile
    if first > k_tiles * (tile + 1):
        return 1, 0
    offset = first - k_tiles * tile
    count = ceil_div(k_tiles - offset, length) + (offset > 0)
    after = length * block - first
    if after < 0 or (offset == 0 and after == 0):
        return count, count - 1
    return count, count - 1 - after // length - (offset > 0)


def split(parts: Schedule) -> list[Part]:
    """The parts of tiles that say they have several."""
    return [part for block in parts for part in block if part.count > 1]


def locks_used(parts: Schedule) -> int:
    """One more than the highest lock that is used; 0 when no tile is split."""
    return max((part.lock + 1 for part in split(parts)), default=0)
