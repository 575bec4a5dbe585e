"""What NVFP4 experts must give: exact sums of a whole layer, and how far rounding may be off.

The bound is a priori and per element. It is carried from operation to operation:

* the products of :mod:`marlin_reference`, whose accumulation is the same on all tensor cores that
  add at least as exactly as Hopper's; what an operand may be off counts with the weight's size;
* SwiGLU takes an interval to an interval, and is rounded as :mod:`swiglu` says;
* activations that are quantized become what :mod:`nvfp4_activations` says: mostly one value, as an
  interval seldom holds a tie.

A backend that rounds less often (TRTLLM keeps float32 between the GEMMs) is within the same bound.
Intermediate results are rounded to bfloat16: the sum of a GEMM, silu, its product, the router's
weight, the weighted row, and the sum over a token's experts, which is made in float32 (``moe_sum``
of 0.26.0 and both finalizing kernels of FlashInfer).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tests.gpu.reference import nvfp4_activations
from tests.gpu.reference.marlin_reference import (
    PER_TERM,
    TURNS,
    U_BFLOAT16,
    U_FLOAT32,
    UNDERFLOW,
    Sums,
)
from tests.gpu.reference.swiglu import U_SWIGLU, silu
from vllm_forge.checkpoints.codecs.nvfp4 import pack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.gpu.reference.marlin_weights import Weights

SILU_LEAST = -1.2784645427610738  # where silu is least


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a layer.

    Attributes:
        gate_up: (experts, hidden, 2 * intermediate), gate first; NVFP4 with multipliers.
        down: (experts, intermediate, hidden).
        limit: of SwiGLU; None is no clamp.
        divisors: global scales of the activations before either GEMM; None: they stay bfloat16.
    """

    gate_up: Weights
    down: Weights
    limit: float | None
    divisors: tuple[float, float] | None

    def checkpoint(self) -> dict[str, NDArray[np.generic]]:
        """Parameters of compressed-tensors by vLLM's names; scales are E4M3 as bytes.

        ``CompressedTensorsW4A4Nvfp4MoEMethod.create_weights`` of 0.26.0 has the shapes.
        """
        first, second = self.divisors or (1.0, 1.0)
        both = np.ones((self.gate_up.experts, 2), np.float32)
        tensors: dict[str, NDArray[np.generic]] = {
            "w13_input_global_scale": np.float32(first) * both,
            "w2_input_global_scale": np.float32(second) * both[:, 0],
        }
        for name, weights in (("w13", self.gate_up), ("w2", self.down)):
            if weights.multiplier is None:
                raise ValueError(f"{name} has no multiplier")
            inverse = np.float32(1) / weights.multiplier
            tensors |= {
                f"{name}_weight_packed": pack(weights.codes.swapaxes(1, 2)),
                f"{name}_weight_scale": weights.scales.astype(np.uint8).swapaxes(1, 2).copy(),
                f"{name}_weight_global_scale": inverse[:, None] * both
                if name == "w13"
                else inverse,
            }
        return tensors

    def shard(self, rank: int, ranks: int) -> Experts:
        """A rank's part of the intermediate size."""
        size = self.down.size_k
        mine = slice(rank * size // ranks, (rank + 1) * size // ranks)
        group = slice(mine.start // 16, mine.stop // 16)
        halves = np.r_[mine, size + mine.start : size + mine.stop]
        return replace(
            self,
            gate_up=replace(
                self.gate_up,
                codes=self.gate_up.codes[:, :, halves],
                scales=self.gate_up.scales[:, :, halves],
            ),
            down=replace(
                self.down, codes=self.down.codes[:, mine], scales=self.down.scales[:, group]
            ),
        )


def expected(
    experts: Experts,
    rows: NDArray[np.float64],
    experts_of: NDArray[np.integer],
    router: NDArray[np.float32],
) -> Sums:
    """What the layer must give, (tokens, hidden), and its bound.

    Args:
        experts: of the layer.
        rows: bfloat16 values, (tokens, hidden).
        experts_of: (tokens, top_k).
        router: their weights, (tokens, top_k).
    """
    tokens, top_k = experts_of.shape
    flat = experts_of.reshape(-1)
    known = Sums(exact=rows, bound=np.zeros_like(rows))
    if experts.divisors is not None:
        known = Sums.between(*nvfp4_activations.spans(rows, rows, experts.divisors[0]))
    known = Sums(
        exact=np.repeat(known.exact, top_k, axis=0), bound=np.repeat(known.bound, top_k, axis=0)
    )
    low, high = _activated(products(experts.gate_up, flat, known), experts.limit)
    if experts.divisors is not None:
        low, high = nvfp4_activations.spans(low, high, experts.divisors[1])
    found = products(experts.down, flat, Sums.between(low, high))
    weight = router.reshape(-1, 1).astype(np.float64)
    found = _rounded(Sums(exact=found.exact * weight, bound=found.bound * np.abs(weight)), 2)
    shape = (tokens, top_k, -1)
    whole = Sums(
        exact=found.exact.reshape(shape).sum(axis=1), bound=found.bound.reshape(shape).sum(axis=1)
    )
    return _rounded(whole, 1)


def products(weights: Weights, flat: NDArray[np.integer], rows: Sums) -> Sums:
    """Rows times their experts' weights, in bfloat16.

    Args:
        weights: of all experts.
        flat: the expert of each row.
        rows: (rows, k), and how far they may be off.
    """
    exact = np.empty((flat.size, weights.size_n))
    slack, size = np.empty_like(exact), np.empty_like(exact)
    for expert in np.unique(flat):
        mine = np.flatnonzero(flat == expert)
        matrix = weights.values[expert]
        factor = 1.0 if weights.multiplier is None else float(weights.multiplier[expert])
        exact[mine] = rows.exact[mine] @ matrix * factor
        slack[mine] = rows.bound[mine] @ np.abs(matrix) * factor
        size[mine] = np.abs(rows.exact[mine]) @ np.abs(matrix) * factor
    terms = PER_TERM * weights.size_k + TURNS
    bound = slack + terms * U_FLOAT32 * (size + slack) + UNDERFLOW * weights.size_k
    return _rounded(Sums(exact=exact, bound=bound), 1)


def _activated(both: Sums, limit: float | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where SwiGLU of an interval lies: least and most, (rows, intermediate)."""
    low, high = both.exact - both.bound, both.exact + both.bound
    (gate_low, up_low), (gate_high, up_high) = np.split(low, 2, axis=1), np.split(high, 2, axis=1)
    if limit is not None:
        gate_low, gate_high = np.minimum(gate_low, limit), np.minimum(gate_high, limit)
        up_low, up_high = np.clip(up_low, -limit, limit), np.clip(up_high, -limit, limit)
    first, second = silu(gate_low), silu(gate_high)
    most = np.maximum(first, second)
    holds_least = (gate_low < SILU_LEAST) & (gate_high > SILU_LEAST)
    least = np.where(holds_least, silu(np.array(SILU_LEAST)), np.minimum(first, second))
    corners = np.stack([least * up_low, least * up_high, most * up_low, most * up_high])
    lowest, highest = corners.min(axis=0), corners.max(axis=0)
    u = U_SWIGLU
    return lowest - u * np.abs(lowest) - UNDERFLOW, highest + u * np.abs(highest) + UNDERFLOW


def _rounded(sums: Sums, times: int) -> Sums:
    u = times * U_BFLOAT16 * (1 + U_BFLOAT16)
    return Sums(exact=sums.exact, bound=sums.bound + u * (np.abs(sums.exact) + sums.bound))
