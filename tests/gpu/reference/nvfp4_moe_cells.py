"""Inputs that show faults of NVFP4 experts: dense rows beyond the clamp, and two kinds of reading.

In dense rows a single scale is lost among the terms of a sum. Reading makes one of the GEMMs pick:
a row that is zero but for one element takes one column of the first weight, and a first weight
that has one element per row hands one intermediate value to the second. Then each weight of the
other GEMM stands alone in a result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tests.gpu.reference.marlin_layout import bfloat16
from tests.gpu.reference.marlin_weights import NVFP4, Weights
from tests.gpu.reference.nvfp4_moe import Experts
from tests.gpu.reference.planted import InWeights

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIMIT = 10.0  # DeepSeek-V4's swiglu_limit
SIX, ONE = 7, 2  # E2M1 codes of 6 and 1
SCALE_ONE = 0x38  # the E4M3 code of 1
# All of it is E4M3's upper range: quantized weights use it, and no small scale hides in a group.
LEAST_SCALE, SCALES_END = 0x68, 0x7F
# So that what is read is quantized without an error: 1.5 * 256 / 6 is E4M3's 64, and
# silu(9) * 1.5 * 32 / 6 is close to its 72.
READ_DIVISORS = (256.0, 32.0)
READ_VALUE = 1.5
# Weights of up to 6 * 448 make a gate of up to 8, below the limit.
READ_SIZE = 2.0**-9
# E4M3's steps from 1 to 2: a value that is a little off crosses a tie of E2M1 in one of them.
LOUDNESS = tuple(1 + step / 8 for step in range(8))


# What reading must notice, and in which GEMM's weight.
FAULTS = tuple(
    (fault, part)
    for fault in (InWeights.ONE_SCALE, InWeights.SWAPPED_EXPERTS, InWeights.TRANSPOSED_SCALES)
    for part in ("gate_up", "down")
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A launch: rows (tokens, hidden), their experts and router weights (tokens, top_k)."""

    experts: Experts
    rows: NDArray[np.float64]
    experts_of: NDArray[np.int32]
    router: NDArray[np.float32]


def both_branches(cell: Cell) -> NDArray[np.float64]:
    """Gates and ups of all rows, as if all were the first row's expert's."""
    first, expert = cell.experts.gate_up, cell.experts_of[0, 0]
    factor = 1.0 if first.multiplier is None else float(first.multiplier[expert])
    found: NDArray[np.float64] = cell.rows @ first.values[expert] * factor
    return found


def weights(
    rng: np.random.Generator, shape: tuple[int, int, int], size: float, *, spread: bool = True
) -> Weights:
    """Random codes and scales; one scale per expert is 448.

    Args:
        rng: of the codes and scales.
        shape: (experts, k, n).
        size: of the multipliers; each expert has another one.
        spread: whether experts differ in their multipliers.
    """
    experts, size_k, size_n = shape
    scales = rng.integers(LEAST_SCALE, SCALES_END, (experts, size_k // 16, size_n), dtype=np.uint8)
    scales[:, 0, 0] = SCALES_END - 1
    divisor = (rng.uniform(0.75, 1.5, experts) if spread else np.ones(experts)) / size
    return Weights(
        format=NVFP4,
        codes=rng.integers(0, 16, shape, dtype=np.uint8),
        scales=scales,
        multiplier=np.float32(1) / divisor.astype(np.float32),
    )


def dense(
    *, experts: int, hidden: int, intermediate: int, tokens: int, top_k: int, routed: str,
    quantized: bool, seed: int = 1, loud: float = 1.0,
) -> Cell:  # fmt: skip
    """Dense rows, gates and ups beyond the clamp on either side.

    Args:
        routed: "even", or "hot": the first expert has every token, the last ones have none.
        quantized: whether activations are.
        loud: factor of the rows.
    """
    rng = np.random.default_rng(seed)
    rows = bfloat16((loud * rng.standard_normal((tokens, hidden))).astype(np.float32))
    # A sum of `hidden` terms, each weight about 600 times the multiplier: gates of about 10.
    first = weights(rng, (experts, hidden, 2 * intermediate), 2.0**-6 / np.sqrt(hidden))
    second = weights(rng, (experts, intermediate, hidden), 2.0**-9 / np.sqrt(intermediate))
    hit = max(top_k, experts if routed == "even" else experts // 2)
    order = rng.permuted(np.tile(np.arange(1, hit), (tokens, 1)), axis=1)[:, : top_k - 1]
    if routed == "even":
        experts_of = (np.arange(tokens)[:, None] + np.arange(top_k)) % hit
    else:
        experts_of = np.hstack([np.zeros((tokens, 1), np.intp), order])
    return Cell(
        experts=Experts(
            gate_up=first, down=second, limit=LIMIT,
            divisors=(448.0 / loud, 16.0) if quantized else None,
        ),
        rows=rows,
        experts_of=experts_of.astype(np.int32),
        router=rng.uniform(0.05, 1, (tokens, top_k)).astype(np.float32),
    )  # fmt: skip


def read_gate_up(
    *, experts: int, hidden: int, intermediate: int, quantized: bool, seed: int = 2
) -> Cell:
    """Every weight of the first GEMM on its own; the second hands each result on.

    Raises:
        ValueError: there are more results than places.
    """
    _must_fit(hidden, intermediate)
    second = _empty(experts, intermediate, hidden)
    diagonal = np.arange(intermediate)
    second.codes[:, diagonal, diagonal] = ONE
    rng = np.random.default_rng(seed)
    first = weights(rng, (experts, hidden, 2 * intermediate), READ_SIZE, spread=False)
    cells = [
        _single(first, second, hidden, READ_VALUE * loud, quantized=quantized)
        for loud in (LOUDNESS if quantized else LOUDNESS[:1])
    ]
    return replace(
        cells[0],
        rows=np.concatenate([cell.rows for cell in cells]),
        experts_of=np.concatenate([cell.experts_of for cell in cells]),
        router=np.concatenate([cell.router for cell in cells]),
    )


def read_down(
    *, experts: int, hidden: int, intermediate: int, quantized: bool, seed: int = 3
) -> Cell:
    """Every weight of the second GEMM on its own, each times silu(9) * 1.5.

    Raises:
        ValueError: there are fewer elements in a row than intermediate values.
    """
    _must_fit(hidden, intermediate)
    first = _empty(experts, hidden, 2 * intermediate)
    diagonal = np.arange(intermediate)
    first.codes[:, diagonal, diagonal] = SIX
    first.codes[:, diagonal, intermediate + diagonal] = ONE
    second = weights(np.random.default_rng(seed), (experts, intermediate, hidden), READ_SIZE)
    return _single(first, second, intermediate, READ_VALUE, quantized=quantized)


def _must_fit(hidden: int, intermediate: int) -> None:
    if hidden < intermediate:
        raise ValueError(f"{intermediate} intermediate values in rows of {hidden}")


def _empty(experts: int, size_k: int, size_n: int) -> Weights:
    """Zeros under scales of one, as another number and its inverse for each expert."""
    power = np.arange(experts, dtype=np.uint8) % 4
    scales = np.broadcast_to(
        (SCALE_ONE + (power << 3))[:, None, None], (experts, size_k // 16, size_n)
    )
    return Weights(
        format=NVFP4,
        codes=np.zeros((experts, size_k, size_n), np.uint8),
        scales=scales.copy(),
        multiplier=(2.0 ** -power.astype(np.float64)).astype(np.float32),
    )


def _single(
    first: Weights, second: Weights, elements: int, value: float, *, quantized: bool
) -> Cell:
    """Rows with one element each, for every expert and every one of the first ``elements``."""
    experts, hidden = first.experts, first.size_k
    rows = np.tile(np.eye(hidden)[:elements] * value, (experts, 1))
    return Cell(
        experts=Experts(
            gate_up=first, down=second, limit=LIMIT, divisors=READ_DIVISORS if quantized else None
        ),
        rows=rows,
        experts_of=np.repeat(np.arange(experts, dtype=np.int32), elements)[:, None],
        router=np.ones((experts * elements, 1), np.float32),
    )
