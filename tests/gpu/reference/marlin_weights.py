"""Weights of experts in the formats that the Marlin MoE kernel reads: values, codes, and layout.

With activations of 16 bits the kernel makes each weight a bfloat16: the code's value times its
group's scale, rounded (``scale`` in marlin_template.h multiplies two bfloat16 numbers). That
rounding is a part of the format; :attr:`Weights.values` has it, so that what is left for a bound is
the sum's rounding alone. NVFP4 and MXFP4 products are exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from tests.gpu.reference.marlin_layout import (
    FP8_BIAS,
    bfloat16,
    bfloat16_bits,
    nvfp4_global_scale,
    nvfp4_scale_bytes,
    order_byte_scales,
    order_scales,
    pack_weights,
)
from vllm_forge.checkpoints.codecs.small_floats import (
    E4M3_NAN,
    e2m1_decode,
    e4m3_decode,
    e8m0_decode,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

IEEE_754, NO_NAN, NAN_AT_THE_ENDS = 1, 0, 2


def scalar_type(
    mantissa: int, *, exponent: int = 0, bias: int = 0, finite: bool = False, nan: int = IEEE_754
) -> int:
    """The ``id()`` of vLLM's ScalarType (csrc/core/scalar_type.hpp); signed if it is a float."""
    fields = ((exponent, 8), (mantissa, 8), (exponent > 0, 1), (bias, 32), (finite, 1), (nan, 8))
    number = at = 0
    for value, width in fields:
        number |= int(value) << at
        at += width
    return number


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """A format.

    Attributes:
        group: elements of K under one scale.
        scale_type: torch's name of the scales' dtype.
        type_id: ``b_type_id`` of the op.
        scale_bytes: of a scale in the kernel's layout.
    """

    name: str
    bits: int
    group: int
    scale_type: str
    type_id: int

    @property
    def scale_bytes(self) -> int:
        return 2 if self.scale_type == "bfloat16" else 1


_FP4 = scalar_type(1, exponent=2, finite=True, nan=NO_NAN)
W4A16 = WeightFormat(
    name="w4a16", bits=4, group=128, scale_type="bfloat16", type_id=scalar_type(4, bias=8)
)
NVFP4 = WeightFormat(name="nvfp4", bits=4, group=16, scale_type="float8_e4m3fn", type_id=_FP4)
MXFP4 = WeightFormat(name="mxfp4", bits=4, group=32, scale_type="float8_e8m0fnu", type_id=_FP4)
FP8 = WeightFormat(
    name="fp8",
    bits=8,
    group=128,
    scale_type="bfloat16",
    type_id=scalar_type(3, exponent=4, finite=True, nan=NAN_AT_THE_ENDS),
)
FORMATS = (W4A16, NVFP4, MXFP4, FP8)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of all experts, by the checkpoint's own numbers.

    Attributes:
        format: of the codes.
        codes: uint8 (experts, k, n).
        scales: (experts, k / group, n); E8M0 and E4M3 as bytes, bfloat16 as float64 values.
        multiplier: float32 (experts,), only with a global scale.
    """

    format: WeightFormat
    codes: NDArray[np.uint8]
    scales: NDArray[np.generic]
    multiplier: NDArray[np.float32] | None = field(default=None)

    @property
    def experts(self) -> int:
        return int(self.codes.shape[0])

    @property
    def size_k(self) -> int:
        return int(self.codes.shape[1])

    @property
    def size_n(self) -> int:
        return int(self.codes.shape[2])

    def scale_values(self) -> NDArray[np.float64]:
        """The scales' values, (experts, k / group, n)."""
        if self.format is MXFP4:
            return e8m0_decode(self.scales.astype(np.uint8))
        if self.format is NVFP4:
            return e4m3_decode(self.scales.astype(np.uint8))
        return self.scales.astype(np.float64)

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """What the kernel multiplies with, without the multiplier; (experts, k, n)."""
        if self.format is W4A16:
            value = self.codes.astype(np.float64) - 8
        elif self.format is FP8:
            value = e4m3_decode(self.codes)
        else:
            value = e2m1_decode(self.codes)
        value *= np.repeat(self.scale_values(), self.format.group, axis=1)
        return value if self.format in (NVFP4, MXFP4) else bfloat16(value)

    @cached_property
    def packed(self) -> NDArray[np.int32]:
        """``b_q_weight``."""
        return pack_weights(self.codes, self.format.bits)

    @cached_property
    def packed_scales(self) -> NDArray[np.generic]:
        """``b_scales``: bytes, or bfloat16 as uint16; (experts, k / group, n)."""
        if self.format is MXFP4:
            return order_byte_scales(self.scales)
        if self.format is NVFP4:
            return order_byte_scales(nvfp4_scale_bytes(self.scale_values())[0])
        shift = FP8_BIAS if self.format is FP8 else 0
        return order_scales(bfloat16_bits(self.scale_values() * 2.0**shift))

    @cached_property
    def kernel_multiplier(self) -> NDArray[np.float32] | None:
        """``global_scale``, (experts,)."""
        if self.multiplier is None:
            return None
        return nvfp4_global_scale(self.multiplier, nvfp4_scale_bytes(self.scale_values())[1])


def random_weights(
    form: WeightFormat, *, experts: int, size_n: int, size_k: int, seed: int
) -> Weights:
    """Weights with every code and with scales that differ from group to group.

    E4M3 scales are at least 2^-4 (vLLM's recoding makes those below 2^-6 zero), and one per expert
    is 448, so that they need no common factor.
    """
    rng = np.random.default_rng(seed)
    shape, groups = (experts, size_k, size_n), (experts, size_k // form.group, size_n)
    codes = rng.integers(0, 1 << form.bits, shape, dtype=np.uint8)
    multiplier = None
    scales: NDArray[np.generic]
    if form is MXFP4:
        scales = rng.integers(118, 127, groups, dtype=np.uint8)
    elif form is NVFP4:
        scales = rng.integers(0x18, 0x7F, groups, dtype=np.uint8)
        scales[:, 0, 0] = 0x7E
        multiplier = rng.uniform(0.75, 1.5, experts).astype(np.float32) * np.float32(2.0**-13)
    else:
        if form is FP8:
            codes[(codes & E4M3_NAN) == E4M3_NAN] = 0
        size = 2.0**-7 if form is W4A16 else 2.0**-11
        scales = bfloat16(rng.uniform(0.75, 1.25, groups) * size)
    return Weights(format=form, codes=codes, scales=scales, multiplier=multiplier)
