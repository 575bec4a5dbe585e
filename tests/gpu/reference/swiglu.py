"""SwiGLU with DeepSeek-V4's clamp: silu(min(gate, L)) * clip(up, -L, L), and its bound.

The kernel (``packed_compute`` in csrc/libtorch_stable/activation_kernels.cu of 0.26.0) works in
float32 and rounds to bfloat16 twice: silu, then the product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.gpu.reference.marlin_reference import U_BFLOAT16, Sums

if TYPE_CHECKING:
    from numpy.typing import NDArray

# expf of CUDA is within 2 ulp; the sum, the division and the product add half an ulp each.
U_SILU = 8 * 2.0**-24
U_SWIGLU = 2 * U_BFLOAT16 + U_BFLOAT16**2 + U_SILU
UNDERFLOW = 2.0**-120


def silu(gate: NDArray[np.float64]) -> NDArray[np.float64]:
    value: NDArray[np.float64] = gate / (1 + np.exp(-gate))
    return value


def swiglu(both: NDArray[np.float64], limit: float | None) -> NDArray[np.float64]:
    """The activation.

    Args:
        both: (rows, 2 * n): gate, then up.
        limit: L; None is no clamp.
    """
    gate, up = np.split(both, 2, axis=1)
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return silu(gate) * up


def activated(both: NDArray[np.float64], limit: float | None) -> Sums:
    """What the kernel must give for bfloat16 inputs, and its bound."""
    exact = swiglu(both, limit)
    return Sums(exact=exact, bound=U_SWIGLU * np.abs(exact) + UNDERFLOW)


def exceeds(both: NDArray[np.float64], limit: float) -> bool:
    """Whether the inputs make a lost clamp visible, on either branch and either side."""
    gate, up = np.split(both, 2, axis=1)
    return bool((gate > limit).any() and (up > limit).any() and (up < -limit).any())
