"""A wo_a whose FP8 group has no input_activations: no patch of ours makes it serve.

Such a group gets CompressedTensorsW8A16Fp8, whose kernels multiply by a weight that they have
packed into int32 words. The output projection never calls the layer: it takes the weight out of
it. What DeepGEMM's fp8_einsum says to that was seen on an H200 with 0.26.0 (utils/layout.hpp:39,
"t.dim() == N"; tests/gpu/mtp/test_deepseek_v4.py::test_weights_only_wo_a_is_not_cured). Here: that
it gets there, on each line, and that no line goes round it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from .output_projection import (
    Shape,
    project,
    record_fp8_kernels,
    rotary_embedding,
    wo_a_module,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPE = Shape()
UTILS = "vllm.model_executor.layers.quantization.utils"
MARLIN, HUMMING = "MarlinFP8ScaledMMLinearKernel", "HummingFP8ScaledMMLinearKernel"
KERNELS = {"0.22": [MARLIN], "0.26": [HUMMING, MARLIN], "0.33": [HUMMING, MARLIN]}
HUMMING_MODULES = {"0.26": f"{UTILS}.humming_utils", "0.33": f"{UTILS}.humming.linear"}


def _codes() -> torch.Tensor:
    """FP8 codes, [groups * rank, group_dim]."""
    return torch.ones(SHAPE.groups * SHAPE.rank, SHAPE.group_dim).to(torch.float8_e4m3fn)


def _as_marlin_packs() -> torch.Tensor:
    pack: Callable[..., torch.Tensor] = importlib.import_module(
        f"{UTILS}.marlin_utils_fp8"
    ).pack_fp8_to_int32
    return pack(_codes(), size_k_first=False)


def _as_humming_packs(line: str) -> torch.Tensor:
    layer: Any = nn.Module()
    layer.weight = nn.Parameter(_codes(), requires_grad=False)
    convert = importlib.import_module(HUMMING_MODULES[line])
    convert.convert_linear_layer_to_humming_standard(layer=layer, name_map={"weight": "weight"})
    weight: torch.Tensor = layer.weight
    return weight


def _project(line: str, monkeypatch: pytest.MonkeyPatch, weight: torch.Tensor) -> torch.Tensor:
    return project(
        line,
        monkeypatch,
        SHAPE,
        attention_output=torch.ones(
            SHAPE.tokens, SHAPE.heads, SHAPE.head_dim, dtype=torch.bfloat16
        ),
        positions=torch.arange(SHAPE.tokens),
        rotary=rotary_embedding(),
        wo_a=wo_a_module(weight.detach(), weight_scale_inv=torch.ones(1, 12)),
    )


def test_no_other_kernel_takes_such_a_group(line: str) -> None:
    from vllm.model_executor.kernels import linear
    from vllm.platforms.interface import PlatformEnum

    kernels = linear._POSSIBLE_WFP8A16_KERNELS[PlatformEnum.CUDA]
    assert [kernel.__name__ for kernel in kernels] == KERNELS[line]


@pytest.mark.lines("0.22")
def test_marlin_is_not_for_these_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """So on 0.22 no projection of such a group finds a kernel, wo_a or not."""
    from vllm.model_executor.kernels.linear.scaled_mm import marlin

    monkeypatch.setattr(marlin.current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(marlin, "is_fp8_marlin_supported", lambda: True)
    for capability, taken in ((80, True), (89, False), (90, False), (100, False), (120, False)):
        assert marlin.MarlinFP8ScaledMMLinearKernel.is_supported(capability)[0] is taken


def test_marlin_packs_words() -> None:
    packed = _as_marlin_packs()
    assert (packed.dtype, packed.dim()) == (torch.int32, 2)


@pytest.mark.lines("0.26", "0.33")
def test_humming_packs_words(line: str) -> None:
    packed = _as_humming_packs(line)
    assert (packed.dtype, packed.dim()) == (torch.int32, 2)


@pytest.mark.lines("0.22", "0.26")
def test_words_go_to_the_fp8_einsum(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = record_fp8_kernels(line, monkeypatch)
    _project(line, monkeypatch, _as_marlin_packs())
    (call,) = seen.einsum
    assert (call["weight"].dtype, call["weight"].dim()) == (torch.int32, 2)


@pytest.mark.lines("0.33")
@pytest.mark.parametrize("pack", ["marlin", "humming"])
def test_words_are_taken_for_bf16(line: str, monkeypatch: pytest.MonkeyPatch, pack: str) -> None:
    """Since 0.30.0 what is not FP8 takes the BF16 path; a BF16 weight of the shape passes it."""
    from vllm.models.deepseek_v4.nvidia.ops import o_proj

    seen = record_fp8_kernels(line, monkeypatch)
    rotated: list[bool] = []

    def rotate(o: torch.Tensor, *_: object, quantize: bool, **__: object) -> tuple[Any, None]:
        rotated.append(quantize)
        return o.reshape(SHAPE.tokens, SHAPE.groups, SHAPE.group_dim), None

    monkeypatch.setattr(o_proj, "fused_inv_rope_fp8_quant", rotate)
    assert _project(line, monkeypatch, _codes().bfloat16()).shape == (5, SHAPE.groups * SHAPE.rank)
    packed = _as_marlin_packs() if pack == "marlin" else _as_humming_packs(line)
    with pytest.raises(RuntimeError):
        _project(line, monkeypatch, packed)
    assert rotated == [False, False]
    assert not seen.einsum
