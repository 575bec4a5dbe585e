"""Runs the pinned vLLM's DeepSeek V4 output projection on a CPU, whatever the line calls it.

0.22.1 does it at the end of `DeepseekV4MultiHeadLatentAttentionWrapper.forward`
(models/deepseek_v4/attention.py:270-347); from 0.23.0 it is the function
`deep_gemm_fp8_o_proj` (models/deepseek_v4/nvidia/ops/o_proj.py). Only what needs a GPU is
replaced: the attention itself, whose output a test supplies, and the two FP8 kernels, whose
arguments are kept. `wo_b` is the identity, so the result is what wo_a produced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    import pytest

RECIPE = (1, 128, 128)
MAX_POSITION = 1024


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Head dims are DeepSeek V4's own (448 + 64); the counts are small."""

    tokens: int = 5
    groups: int = 2
    heads_per_group: int = 3
    rank: int = 16
    nope_dim: int = 448
    rope_dim: int = 64

    @property
    def heads(self) -> int:
        return self.groups * self.heads_per_group

    @property
    def head_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def group_dim(self) -> int:
        return self.heads_per_group * self.head_dim


@dataclass(kw_only=True)
class Recorded:
    """What reached the FP8 kernels: one entry per call."""

    quantized: list[dict[str, Any]] = field(default_factory=list)
    einsum: list[dict[str, Any]] = field(default_factory=list)
    o_fp8: torch.Tensor = field(default_factory=lambda: torch.zeros(1))
    o_scale: torch.Tensor = field(default_factory=lambda: torch.ones(1))


def rotary_embedding() -> nn.Module:
    """The real embedding, built as the attention layer builds it, with a short cache."""
    from vllm.model_executor.layers.rotary_embedding import get_rope

    rope: nn.Module = get_rope(
        Shape().head_dim,
        max_position=MAX_POSITION,
        rope_parameters={
            "rope_type": "deepseek_yarn",
            "rope_theta": 10000.0,
            "factor": 16,
            "original_max_position_embeddings": MAX_POSITION // 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0,
            "mscale_all_dim": 0,
            "is_deepseek_v4": True,
            "rope_dim": Shape().rope_dim,
        },
        is_neox_style=False,
    )
    return rope


def wo_a_module(weight: torch.Tensor, **tensors: torch.Tensor) -> nn.Module:
    """A wo_a with these parameters and no others."""
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


def padded(attention_output: torch.Tensor) -> torch.Tensor:
    """The buffer that attention writes: more heads than the layer has, the rest not a number.

    The kernels want 64 or 128 query heads, so the projection sees a slice of a wider tensor;
    NaN shows at once when it reads past its heads or takes the slice for contiguous.
    """
    tokens, heads, head_dim = attention_output.shape
    buffer = attention_output.new_full((tokens, heads + 2, head_dim), float("nan"))
    buffer[:, :heads] = attention_output
    return buffer


def record_fp8_kernels(line: str, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Replace the two FP8 kernels of the projection by recorders."""
    seen = Recorded()

    def quantize(
        o: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen.quantized.append(
            {"o": o, "positions": positions, "cos_sin_cache": cos_sin_cache, **kwargs}
        )
        seen.o_fp8 = torch.zeros(o.shape[0], 1, dtype=torch.uint8)
        return seen.o_fp8, seen.o_scale

    def keep(equation: str, a: Any, b: Any, z: torch.Tensor, recipe: tuple[int, ...]) -> None:
        seen.einsum.append(
            {
                "equation": equation,
                "o": a[0],
                "o_scale": a[1],
                "weight": b[0],
                "weight_scale": b[1],
                "recipe": tuple(recipe),
            }
        )
        z.zero_()

    if line == "0.22":
        from vllm.models.deepseek_v4 import attention

        def einsum_op(*arguments: Any) -> None:
            o, o_scale, weight, weight_scale, z, equation, recipe = arguments
            keep(equation, (o, o_scale), (weight, weight_scale), z, tuple(recipe))

        monkeypatch.setattr(attention, "fused_inv_rope_fp8_quant", quantize)
        monkeypatch.setattr(torch.ops.vllm, "deepseek_v4_fp8_einsum", einsum_op, raising=False)
    else:
        from vllm.models.deepseek_v4.nvidia.ops import o_proj

        def einsum(
            equation: str, a: object, b: object, z: torch.Tensor, *, recipe: tuple[int, ...]
        ) -> None:
            keep(equation, a, b, z, recipe)

        monkeypatch.setattr(o_proj, "fused_inv_rope_fp8_quant", quantize)
        monkeypatch.setattr(o_proj, "fp8_einsum", einsum)
    return seen


def project(
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    shape: Shape,
    *,
    attention_output: torch.Tensor,
    positions: torch.Tensor,
    rotary: nn.Module,
    wo_a: nn.Module,
) -> torch.Tensor:
    """Attention output [T, H, D] to wo_a's output, flattened as wo_b gets it."""
    if line == "0.22":
        return _project_in_wrapper(
            monkeypatch,
            shape,
            attention_output=attention_output,
            positions=positions,
            rotary=rotary,
            wo_a=wo_a,
        )
    from vllm.models.deepseek_v4.nvidia.ops.o_proj import deep_gemm_fp8_o_proj

    result: torch.Tensor = deep_gemm_fp8_o_proj(
        padded(attention_output)[:, : shape.heads],
        positions,
        rotary.cos_sin_cache,
        wo_a,
        nn.Identity(),
        n_groups=shape.groups,
        heads_per_group=shape.heads_per_group,
        nope_dim=shape.nope_dim,
        rope_dim=shape.rope_dim,
        o_lora_rank=shape.rank,
        einsum_recipe=RECIPE,
        tma_aligned_scales=False,
    )
    return result


def _project_in_wrapper(
    monkeypatch: pytest.MonkeyPatch,
    shape: Shape,
    *,
    attention_output: torch.Tensor,
    positions: torch.Tensor,
    rotary: nn.Module,
    wo_a: nn.Module,
) -> torch.Tensor:
    from vllm.models.deepseek_v4 import attention

    cls = attention.DeepseekV4MultiHeadLatentAttentionWrapper
    layer = object.__new__(cls)
    nn.Module.__init__(layer)
    layer.padded_heads = shape.heads + 2
    layer.n_local_heads = shape.heads
    layer.n_local_groups = shape.groups
    layer.head_dim = shape.head_dim
    layer.nope_head_dim = shape.nope_dim
    layer.rope_head_dim = shape.rope_dim
    layer.o_lora_rank = shape.rank
    layer.layer_name = "contract"
    layer.rotary_emb = rotary
    layer.wo_a = wo_a
    layer.wo_b = nn.Identity()
    layer._einsum_recipe = RECIPE
    layer._tma_aligned_scales = False

    def attend(
        hidden_states: torch.Tensor, positions: torch.Tensor, out: torch.Tensor, name: str
    ) -> None:
        out.copy_(padded(attention_output))

    monkeypatch.setattr(torch.ops.vllm, "deepseek_v4_attention", attend, raising=False)
    hidden_states = torch.zeros(shape.tokens, 1, dtype=attention_output.dtype)
    result: torch.Tensor = layer.forward(positions, hidden_states)
    return result
