"""NVFP4 global scales load as a scalar and as a tensor of one element alike.

llm-compressor writes them with shape (1,), which vllm-project/vllm#43297 reports as trouble; the
family's post-processing squeezes 66,048 of them for it. The real loader of each line takes both
(fused_moe/layer.py:561 in 0.22.1; fused_moe/routed_experts.py, `_to_scalar`, from 0.26.0), so
neither a patch nor that step is needed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

EXPERTS = 3


def _loader() -> Any:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    layer = object.__new__(RoutedExperts)
    nn.Module.__init__(layer)
    return layer


@pytest.mark.parametrize("shape", [(), (1,)])
def test_weight_scales_of_both_shapes_load(shape: tuple[int, ...]) -> None:
    w13 = nn.Parameter(torch.zeros(EXPERTS, 2), requires_grad=False)
    w2 = nn.Parameter(torch.zeros(EXPERTS), requires_grad=False)
    loader = _loader()
    for shard, parameter, value in (("w1", w13, 3.0), ("w3", w13, 5.0), ("w2", w2, 7.0)):
        loader._load_per_tensor_weight_scale(
            shard_id=shard,
            param=parameter,
            loaded_weight=torch.full(shape, value),
            expert_id=1,
        )
    assert w13.tolist() == [[0, 0], [3, 5], [0, 0]]
    assert w2.tolist() == [0, 7, 0]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_an_input_scale_of_both_shapes_loads(shape: tuple[int, ...]) -> None:
    scale = nn.Parameter(torch.zeros(EXPERTS), requires_grad=False)
    _loader()._load_single_value(param=scale, loaded_weight=torch.full(shape, 9.0), expert_id=2)
    assert scale.tolist() == [0, 0, 9]
