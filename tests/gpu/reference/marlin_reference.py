"""What a launch of the Marlin MoE kernel must give: exact sums, and how far rounding may be off.

The bound is a priori, per element, from the order of operations alone; nothing in it is tuned.

* Products of two bfloat16 numbers are exact. A tensor core adds 16 of them to the accumulator at a
  time, aligned to the largest and cut off, not rounded; with two bits more than float32 has, as on
  Hopper, a step is off by at most 19 * 2^-24 of the largest sum of magnitudes (Fasi, Higham,
  Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 2021;
  Khattak and Mikaitis, "Accurate models of NVIDIA tensor cores", 2025). So K/16 steps are off by
  less than 1.25 * K * 2^-24; TURNS more cover warps' and thread blocks' float32 sums, whose number
  is bounded by the depth of the reduction, not by K.
* Each rounding to bfloat16 is off by at most 2^-8 of the value. With router weights there are two:
  the sum, then its product with the weight, which is itself rounded first (exactly modelled).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.gpu.reference.marlin_kernel import ceil_div
from tests.gpu.reference.marlin_layout import bfloat16

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.gpu.reference.marlin_weights import Weights

U_FLOAT32, U_BFLOAT16 = 2.0**-24, 2.0**-8
PER_TERM, TURNS = 1.25, 64
# Where float32 ends while weights are held 2^-126 times as large (NVFP4): an absolute error.
UNDERFLOW = 2.0**-149 * 2.0**119


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Rows sorted by expert as ``moe_align_block_size`` does it, but always in the same order.

    The op itself takes slots with ``atomicAdd``, so its order within an expert varies.

    Attributes:
        block: rows of a block, all of one expert.
        experts_of: int32 (tokens, top_k), the expert of each row.
        sorted_ids: int32, rows in order; ``tokens * top_k`` where a block is padded.
        expert_ids: int32, one per block, -1 after the last.
        padded: rows with their padding, ``num_tokens_past_padded``.
    """

    block: int
    experts_of: NDArray[np.int32]
    sorted_ids: NDArray[np.int32]
    expert_ids: NDArray[np.int32]
    padded: int

    @property
    def tokens(self) -> int:
        return int(self.experts_of.shape[0])

    @property
    def top_k(self) -> int:
        return int(self.experts_of.shape[1])


def route(experts_of: NDArray[np.integer], experts: int, block: int) -> Routing:
    """Sort rows by expert.

    Args:
        experts_of: (tokens, top_k).
        experts: how many there are.
        block: rows of a block.
    """
    flat = experts_of.reshape(-1)
    rows: list[int] = []
    blocks: list[int] = []
    for expert in range(experts):
        mine = np.flatnonzero(flat == expert).tolist()
        count = ceil_div(len(mine), block)
        rows += mine + [flat.size] * (count * block - len(mine))
        blocks += [expert] * count
    # The op's own output has room for the worst case; what lies behind ``padded`` is not read.
    room = max(min(flat.size + experts * (block - 1), flat.size * block), len(rows))
    sorted_ids = np.full(ceil_div(room, block) * block, flat.size, np.int32)
    sorted_ids[: len(rows)] = rows
    expert_ids = np.full(sorted_ids.size // block, -1, np.int32)
    expert_ids[: len(blocks)] = blocks
    return Routing(
        block=block,
        experts_of=np.ascontiguousarray(experts_of, dtype=np.int32),
        sorted_ids=sorted_ids,
        expert_ids=expert_ids,
        padded=len(rows),
    )


def spread(tokens: int, top_k: int, hit: int) -> NDArray[np.int32]:
    """Experts 0 to ``hit`` - 1 in turn: each gets as many rows as any other, or one more.

    Raises:
        ValueError: a token would get an expert twice.
    """
    if top_k > hit:
        raise ValueError(f"{top_k} different experts of {hit}")
    return (np.arange(tokens * top_k, dtype=np.int32) % hit).reshape(tokens, top_k)


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Exact results and their bounds, float64 (tokens * top_k, n)."""

    exact: NDArray[np.float64]
    bound: NDArray[np.float64]

    @classmethod
    def between(cls, low: NDArray[np.float64], high: NDArray[np.float64]) -> Sums:
        """An interval, by its middle and half of its width."""
        return cls(exact=(low + high) / 2, bound=(high - low) / 2)


def sums(
    weights: Weights,
    routing: Routing,
    activations: NDArray[np.float64],
    router: NDArray[np.float32] | None = None,
) -> Sums:
    """The products of rows with their experts' weights.

    Args:
        weights: of all experts.
        routing: which row is whose.
        activations: bfloat16 values, (tokens, k).
        router: the rows' weights (tokens, top_k), where the op multiplies with them.
    """
    flat = routing.experts_of.reshape(-1)
    exact = np.empty((flat.size, weights.size_n))
    size = np.empty_like(exact)
    for expert in np.unique(flat):
        mine = np.flatnonzero(flat == expert)
        rows = activations[mine // routing.top_k]
        exact[mine] = rows @ weights.values[expert]
        size[mine] = np.abs(rows) @ np.abs(weights.values[expert])
    factor = np.ones(flat.size)
    if weights.multiplier is not None:
        factor = weights.multiplier[flat].astype(np.float64)
    tiny = UNDERFLOW * weights.size_k * np.abs(factor)
    if router is not None:
        # As the kernel: float32 product with the multiplier, then bfloat16.
        product = router.reshape(-1).astype(np.float32) * factor.astype(np.float32)
        factor = bfloat16(product)
    exact *= factor[:, None]
    size *= np.abs(factor)[:, None]
    sum_error = (PER_TERM * weights.size_k + TURNS) * U_FLOAT32 * size + tiny[:, None]
    roundings = 1 if router is None else 2
    u = roundings * U_BFLOAT16 * (1 + U_BFLOAT16)
    return Sums(exact=exact, bound=sum_error + u * (np.abs(exact) + sum_error))


def margin(result: NDArray[np.float64], reference: Sums) -> float:
    """The largest error as a share of its bound; infinite with a NaN. Above 1 it is a fault."""
    error = np.abs(result - reference.exact)
    if not np.isfinite(error).all():
        return float("inf")
    return float((error / np.maximum(reference.bound, np.finfo(np.float64).tiny)).max())


def read_out(weights: Weights, routing: Routing) -> NDArray[np.float64]:
    """What the kernel must give, bit for bit, for rows of the identity and one expert per token.

    There is one product and no sum, so the only roundings are float32 of the product with the
    multiplier and bfloat16 of that.
    """
    flat = routing.experts_of.reshape(-1)
    value = weights.values[flat, np.arange(flat.size) % weights.size_k]
    if weights.multiplier is None:
        return value
    return bfloat16(value.astype(np.float32) * weights.multiplier[flat][:, None])
