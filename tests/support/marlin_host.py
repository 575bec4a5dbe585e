"""The Marlin MoE launch as its host code sees it: shared memory, locks, a schedule's limits.

As tests.gpu.reference.marlin_kernel, which has what the GPU suite needs of the kernel.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from tests.gpu.reference.marlin_kernel import (
    BLOCKS_PER_SM,
    FRAGMENT,
    Kernel,
    ceil_div,
    reduce_end,
)
from tests.gpu.reference.marlin_schedule import Launch, Part, Schedule, split

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

INT4_BYTES = 16  # CUDA's int4, four 32-bit integers
MIN_THREAD_N = 64
# What determine_exec_config leaves unused of a multiprocessor's shared memory.
LAUNCH_SLACK = 512


def cache_size(kernel: Kernel) -> int:
    """Bytes of shared memory that the host thinks the kernel uses.

    Cited: ``int get_kernel_cache_size`` at ops.cu 0.22.1:175 0.26.0:183 0.33.0:93
    """
    rows, config = kernel.m_blocks * FRAGMENT, kernel.config
    metadata = rows * 16
    activations = kernel.stages * rows * config.k * kernel.activation_bytes
    weights = kernel.stages * (config.k * config.n // (32 // kernel.weight_bits)) * 4
    reduction = rows * (config.n + 8) * 2
    bias = config.n * 2
    shared = max(weights, reduction, min(weights, reduction) + bias)
    groups = 1 if kernel.group_size == -1 else ceil_div(config.k, kernel.group_size)
    scales = groups * config.n * 2 * kernel.stages
    zeros = scales * kernel.weight_bits // 16 if kernel.zero_points else 0
    return shared + activations + scales + zeros + metadata


def layout_size(kernel: Kernel) -> int:
    """Bytes of shared memory that the kernel's own layout spans.

    With 8-bit activations it starts with one float per row for their scales, which
    :func:`cache_size` does not count.

    Cited: ``int4* sh_block_sorted_ids_int4`` at marlin_template.h 0.22.1:435 0.26.0:435 0.33.0:406
    Cited: ``constexpr int sh_red_size`` at marlin_template.h 0.22.1:872 0.26.0:872 0.33.0:821
    Cited: ``int4* sh_a = sh_s`` at marlin_template.h 0.22.1:893 0.26.0:893 0.33.0:840
    """
    config, stages, eight = kernel.config, kernel.stages, kernel.activation_bytes == 1
    n_blocks, k_blocks = config.n // FRAGMENT, config.k // FRAGMENT
    pack = 32 // kernel.weight_bits
    end = 4 * kernel.m_blocks if eight else 0
    end += kernel.block  # row ids, their tokens, router weights (padded)
    weights = stages * (config.n * FRAGMENT // pack // (2 if eight else 4)) * k_blocks
    weights //= 2 if eight else 1
    reduction = (2 * n_blocks + 1) * FRAGMENT * kernel.m_blocks
    end += max(weights, reduction, min(weights, reduction) + config.n // 8)
    group_blocks = kernel.group_size // FRAGMENT
    groups = k_blocks // group_blocks if 0 < group_blocks < k_blocks else 1
    if kernel.zero_points:
        end += stages * groups * (config.n // pack // 4)
    end += stages * groups * (config.n * kernel.scale_bytes // INT4_BYTES)
    end += stages * kernel.block * (config.k * kernel.activation_bytes // INT4_BYTES)
    return end * INT4_BYTES


def least_workspace(kernel: Kernel, size_n: int, sorted_ids: int, sms: int) -> int:
    """Locks (32-bit integers) that the host insists on; vLLM's experts allocate 4 * ``sms``.

    Cited: ``int min_workspace_size`` at ops.cu 0.22.1:838 0.26.0:858 0.33.0:668
    """
    return min(size_n // MIN_THREAD_N * (sorted_ids // kernel.block), sms * BLOCKS_PER_SM)


def faults(launch: Launch, parts: Schedule, *, workspace: int, c_tmp: int) -> list[str]:
    """What is wrong with a schedule; empty for a right one.

    Every tile must be covered once; its parts must agree on how many they are and take the turns
    0, 1, ... from the bottom up, one turn each; no two tiles may share a lock; no lock and no slot
    of ``c_tmp`` may lie outside its buffer.

    Args:
        launch: the launch.
        parts: its schedule.
        workspace: locks in the workspace.
        c_tmp: floats in the buffer of partial sums.
    """
    tiles: dict[int, list[Part]] = defaultdict(list)
    for part in (part for block in parts for part in block):
        tiles[part.tile].append(part)
    found = []
    if set(tiles) != set(range(launch.tiles)):
        found.append(f"{len(tiles)} of {launch.tiles} tiles are computed")
    locks: dict[int, int] = {}
    for tile, shares in sorted(tiles.items()):
        found += [f"tile {tile}: {what}" for what in _tile_faults(launch, shares)]
        if len(shares) > 1 and (other := locks.setdefault(shares[0].lock, tile)) != tile:
            found.append(f"tile {tile}: lock {shares[0].lock} is tile {other}'s")
    return found + _overruns(launch, split(parts), workspace, c_tmp)


def _tile_faults(launch: Launch, shares: list[Part]) -> Iterator[str]:
    shares = sorted(shares, key=lambda part: part.row)
    covered = 0
    for part in shares:
        if part.row != covered or part.rows < 1:
            yield f"rows {covered} to {part.row} are computed by no block, or by two"
        covered = part.row + part.rows
    if covered != launch.k_tiles:
        yield f"rows end at {covered}, not at {launch.k_tiles}"
    if any(part.count != len(shares) for part in shares):
        yield f"has {len(shares)} parts, which say {[part.count for part in shares]}"
    if [part.index for part in shares] != list(reversed(range(len(shares)))):
        yield f"parts from the top take the turns {[part.index for part in shares]}"
    if len(shares) > 1 and len({part.lock for part in shares}) > 1:
        yield f"parts use the locks {[part.lock for part in shares]}"


def _overruns(launch: Launch, shared: Iterable[Part], workspace: int, c_tmp: int) -> list[str]:
    locks = {part.lock for part in shared}
    if not locks:
        return []
    found = []
    if min(locks) < 0 or max(locks) >= workspace:
        found.append(f"locks {min(locks)} to {max(locks)}, the workspace has {workspace}")
    if (end := reduce_end(launch.kernel, max(locks))) > c_tmp:
        found.append(f"c_tmp is used up to float {end}, it has {c_tmp}")
    return found
