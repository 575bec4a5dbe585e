"""The FP8 block scale of wo_a is found under the name it has.

`Fp8LinearMethod` registers `weight_scale_inv`; compressed-tensors registers `weight_scale`
(schemes/compressed_tensors_w8a8_fp8.py, BLOCK), and the block-scaled kernels replace the one they
find under its own name (kernels/linear/scaled_mm/BlockScaledMMLinearKernel.py:75-89 in 0.22.1),
asking for `weight_scale_inv` first. 0.22.1 reads only `weight_scale_inv`
(models/deepseek_v4/attention.py:330), as does 0.26.0 (nvidia/ops/o_proj.py:66); 0.27.0 learnt the
other name (o_proj.py:63), so line 0.33 is green as published.
Found by vllm-project/vllm#43290.
"""

from __future__ import annotations

import pytest
import torch

from .output_projection import (
    RECIPE,
    Shape,
    project,
    record_fp8_kernels,
    rotary_embedding,
    wo_a_module,
)

SHAPE = Shape()


def _fp8_weight() -> torch.Tensor:
    return torch.zeros(SHAPE.groups * SHAPE.rank, SHAPE.group_dim).to(torch.float8_e4m3fn)


def _block_scales(rows: int = 4) -> torch.Tensor:
    return torch.arange(1.0, rows * 12 + 1.0).view(rows, 12)


def _scale_that_reaches_the_einsum(
    line: str, monkeypatch: pytest.MonkeyPatch, **scales: torch.Tensor
) -> torch.Tensor:
    seen = record_fp8_kernels(line, monkeypatch)
    wo_a = wo_a_module(_fp8_weight(), **scales)
    project(
        line,
        monkeypatch,
        SHAPE,
        attention_output=torch.zeros(
            SHAPE.tokens, SHAPE.heads, SHAPE.head_dim, dtype=torch.bfloat16
        ),
        positions=torch.arange(SHAPE.tokens),
        rotary=rotary_embedding(),
        wo_a=wo_a,
    )
    assert len(seen.einsum) == 1
    call = seen.einsum[0]
    assert call["weight"] is wo_a.weight
    assert call["recipe"] == RECIPE
    scale = call["weight_scale"]
    assert isinstance(scale, torch.Tensor)
    return scale


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_scale_is_found_under_its_only_name(
    line: str, monkeypatch: pytest.MonkeyPatch, name: str, rows: int
) -> None:
    scale = _block_scales(rows)
    assert torch.equal(_scale_that_reaches_the_einsum(line, monkeypatch, **{name: scale}), scale)


@pytest.mark.parametrize("elements", [1, 48])
@pytest.mark.lines("0.22", "0.26")
def test_of_two_scales_the_one_the_kernels_transform_is_read(
    line: str, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    """No loader registers both today. If one did, these kernels would transform only _inv.

    Upstream's later form asks for weight_scale first, so this is no concern of line 0.33.
    """
    transformed = torch.full((elements,), 2.0)
    left_alone = torch.zeros(elements)
    scale = _scale_that_reaches_the_einsum(
        line, monkeypatch, weight_scale_inv=transformed, weight_scale=left_alone
    )
    assert torch.equal(scale, transformed)


def test_a_scale_of_zeros_is_a_scale(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A truth test would take a single zero for a missing scale and look under the other name."""
    zero = torch.zeros(1)
    scale = _scale_that_reaches_the_einsum(line, monkeypatch, weight_scale_inv=zero)
    assert torch.equal(scale, zero)


def test_no_scale_at_all_is_an_error(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttributeError, match="weight_scale"):
        _scale_that_reaches_the_einsum(line, monkeypatch)
