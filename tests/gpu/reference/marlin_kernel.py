"""Memory of the Marlin MoE kernel: what the host reserves, and what the kernel touches.

The kernel is vLLM's ``moe_wna16_marlin_gemm`` (``csrc/moe/marlin_moe_wna16``; in 0.24 to 0.29
below ``csrc/libtorch_stable``). Activation order (``desc_act``) is not modelled: 0.33.0 has no such
kernel left. Standard library only, as it also runs where the kernel does. The contract tests
compile the release's own text and compare; they also check every line that is cited here.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOATS_PER_INT4 = 4
FRAGMENT = 16  # rows and columns of what a tensor core multiplies
MAX_THREAD_N = 256
BLOCKS_PER_SM = 4  # the most that a launch may have


@dataclass(frozen=True, kw_only=True)
class ThreadConfig:
    """The tile of one thread block: ``k`` and ``n`` in elements, and its threads."""

    k: int
    n: int
    threads: int


# Cited: ``small_batch_thread_configs[]`` at ops.cu 0.22.1:124 0.26.0:132 0.33.0:54
SMALL_BATCH = (
    ThreadConfig(k=128, n=128, threads=256),
    ThreadConfig(k=64, n=128, threads=128),
    ThreadConfig(k=128, n=64, threads=128),
)
# Cited: ``large_batch_thread_configs[]`` at ops.cu 0.22.1:132 0.26.0:140 0.33.0:62
LARGE_BATCH = (
    ThreadConfig(k=64, n=256, threads=256),
    ThreadConfig(k=64, n=128, threads=128),
    ThreadConfig(k=128, n=64, threads=128),
)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One instance of the kernel's template.

    Attributes:
        config: tile of a thread block.
        block: ``moe_block_size``, rows of one expert that a tile has: 8, 16, 32, 48 or 64.
        group_size: elements of K under one scale; -1: one scale per column.
        weight_bits: 4 or 8.
        activation_bytes: 2, or 1 (W4A8 with INT8 or FP8).
        scale_bytes: 2, or 1 (NVFP4, MXFP4).
        zero_points: whether there are any (AWQ).
        stages: depth of the pipeline.
    """

    config: ThreadConfig
    block: int
    group_size: int
    weight_bits: int = 4
    activation_bytes: int = 2
    scale_bytes: int = 2
    zero_points: bool = False
    stages: int = 4

    @property
    def m_blocks(self) -> int:
        """``thread_m_blocks``: fragments of the tile, one above the other."""
        return ceil_div(self.block, FRAGMENT)

    @property
    def half_fragment(self) -> bool:
        """``m_block_size_8``: rows 8 to 15 of the only fragment are not there."""
        return self.block < FRAGMENT


def ceil_div(a: int, b: int) -> int:
    """Quotient of two non-negative integers, rounded up."""
    return -(-a // b)


def reduce_end(kernel: Kernel, lock: int) -> int:
    """Floats of ``c_tmp`` up to the last one that the reduction under a lock touches.

    Only the warps of one row of the tile take part: 32 threads for each 64 columns (32 with 8-bit
    activations). Upstream's pull request 36889 counts 256 threads instead.

    Cited: ``constexpr int c_size`` at marlin_template.h 0.22.1:1714 0.26.0:1714 0.33.0:1506
    Cited: ``constexpr int tb_n_warps`` at marlin_template.h 0.22.1:716 0.26.0:716 0.33.0:675
    """
    eight = kernel.activation_bytes == 1
    slot = kernel.m_blocks * FRAGMENT * kernel.config.n // FLOATS_PER_INT4
    active = 32 * (kernel.config.n // FRAGMENT // (2 if eight else 4))
    vectors = kernel.m_blocks * (2 if eight else 4) * 2
    if kernel.half_fragment:  # of each pair of vectors the second is of rows 8 to 15
        vectors -= 1
    return (lock * slot + active * vectors) * FLOATS_PER_INT4


def c_tmp_size(kernel: Kernel, size_n: int, sorted_ids: int, sms: int) -> int:
    """Floats of ``c_tmp`` that the host allocates.

    Args:
        kernel: only its ``block`` matters here.
        size_n: columns of the output.
        sorted_ids: length of ``sorted_token_ids``, at least the padded tokens.
        sms: multiprocessors.

    Cited: ``long max_c_tmp_size`` at ops.cu 0.22.1:694 0.26.0:711 0.33.0:558
    """
    size = min(size_n * sorted_ids, sms * BLOCKS_PER_SM * kernel.block * MAX_THREAD_N)
    return size * 2 if kernel.half_fragment else size
