"""W4A16 experts quantized with static activation order: each rank keeps the scales of its rows.

GPTQ's default actorder is "static", an alias of "weight": the format has no g_idx and its groups
are contiguous (compressed_tensors/quantization/quant_args.py, ActivationOrdering). 0.22.1 keeps
every rank's w2 scales for any actorder
(compressed_tensors_moe_wna16_marlin.py:212 and :217) and the kernel infers the group size from
their number, so with tensor parallelism it reads the scales of other groups and nobody is told.
0.26.0 decides by "group" (`_w2_scale_sharding`, :197). Found by vllm-project/vllm#41161.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

GROUP_SIZE = 128
INTERMEDIATE = 2048  # DeepSeek V4 Flash's experts
HIDDEN, EXPERTS = 256, 2


def _method_class() -> Any:
    module = importlib.import_module(
        "vllm.model_executor.layers.quantization.compressed_tensors."
        "compressed_tensors_moe.compressed_tensors_moe_wna16_marlin"
    )
    return module.CompressedTensorsWNA16MarlinMoEMethod


def _actorder(name: str | None) -> Any:
    """The value as compressed-tensors parses it from a config."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=4,
        type="int",
        strategy="group",
        group_size=GROUP_SIZE,
        symmetric=True,
        actorder=name,
    ).actorder


def _create(actorder: str | None, tensor_parallel: int) -> tuple[Any, Any]:
    """The real create_weights for one rank."""
    method = object.__new__(_method_class())
    method.num_bits = 4
    method.packed_factor = 8
    method.strategy = "group"
    method.group_size = GROUP_SIZE
    method.actorder = _actorder(actorder)
    method.kernel_backend = "Marlin"
    method.moe = SimpleNamespace(is_act_and_mul=True)
    layer = nn.Module()
    method.create_weights(
        layer,
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size_per_partition=INTERMEDIATE // tensor_parallel,
        params_dtype=torch.bfloat16,
        intermediate_size_full=INTERMEDIATE,
    )
    return method, layer


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
@pytest.mark.parametrize("actorder", [None, "weight", "static"])
@pytest.mark.lines("0.22")
def test_w2_scales_of_a_rank_match_its_rows(actorder: str | None, tensor_parallel: int) -> None:
    method, layer = _create(actorder, tensor_parallel)
    rows = INTERMEDIATE // tensor_parallel
    inferred_group_size = rows // layer.w2_weight_scale.shape[1]
    assert inferred_group_size == GROUP_SIZE
    assert not layer.w2_weight_scale.load_full_w2
    assert method.is_k_full is True


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
@pytest.mark.lines("0.22")
def test_a_g_idx_still_keeps_every_scale(tensor_parallel: int) -> None:
    method, layer = _create("group", tensor_parallel)
    assert layer.w2_weight_scale.shape[1] == INTERMEDIATE // GROUP_SIZE
    assert layer.w2_weight_scale.load_full_w2 is True
    assert method.is_k_full is (tensor_parallel == 1)


@pytest.mark.parametrize(("actorder", "full"), [(None, False), ("static", False), ("group", True)])
@pytest.mark.lines("0.26")
def test_the_decision_by_group_landed(actorder: str | None, full: bool) -> None:
    """Why line 0.26 carries no such patch."""
    load_full, scale_rows, is_k_full = _method_class()._w2_scale_sharding(
        _actorder(actorder), GROUP_SIZE, INTERMEDIATE // 4, INTERMEDIATE
    )
    assert bool(load_full) is full
    assert scale_rows == (INTERMEDIATE if full else INTERMEDIATE // 4)
    assert is_k_full is not full
