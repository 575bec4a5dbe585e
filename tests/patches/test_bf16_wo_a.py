"""A BF16 wo_a: the output projection on a CPU against a float64 reference.

A multi-token-prediction block that stays BF16 in a quantized checkpoint has a BF16 wo_a. On CUDA
0.22.1 always quantizes (models/deepseek_v4/attention.py:317), as does 0.26.0
(nvidia/ops/o_proj.py:50), so such a layer ends in AttributeError on its missing scale. 0.30.0
landed a path of its own (o_proj.py:49 and :80). It needs a Triton kernel that a CPU cannot run,
so its line is not compared here. Found by vllm-project/vllm#43319 and #44847.

The bound is a priori. With u = 2^-8 the unit roundoff of BF16 and e = 2^-24 that of FP32, each
output sum(w x) over K terms may be off by
  * its own rounding to BF16:                      u |sum|
  * the rotated lanes of x, rounded to BF16 once:  u sum |w x| over those lanes
  * the rotation in FP32:                          4 e sum |w| (|even| + |odd|) over those lanes
  * a sum of K products in FP32, in any order:     K e sum |w x|
and by no more. Second-order terms are covered by a factor of 1 + u. It holds for any order of
summation, so it is the same bound on a GPU. Every planted fault below must break it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from .output_projection import (
    MAX_POSITION,
    Shape,
    project,
    record_fp8_kernels,
    rotary_embedding,
    wo_a_module,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    Fault = Callable[["Inputs"], torch.Tensor]

U_BF16 = 2.0**-8
U_FP32 = 2.0**-24
SHAPES = {
    "small": Shape(),
    "one-token": Shape(tokens=1),
    "as-served": Shape(tokens=33, groups=2, heads_per_group=8, rank=64),
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One problem: BF16 attention output and weight, positions, and the real rotary embedding."""

    shape: Shape
    o: torch.Tensor
    positions: torch.Tensor
    weight: torch.Tensor
    rotary: nn.Module

    @property
    def cos_sin(self) -> torch.Tensor:
        cache = self.rotary.cos_sin_cache
        assert isinstance(cache, torch.Tensor)
        return cache


def _inputs(shape: Shape) -> Inputs:
    seed = torch.Generator().manual_seed(43319)
    o = torch.randn(shape.tokens, shape.heads, shape.head_dim, generator=seed)
    weight = torch.randn(shape.groups * shape.rank, shape.group_dim, generator=seed)
    # From 1: at position 0 a rotation is the identity and hides what is wrong with it.
    positions = torch.randint(1, MAX_POSITION - 1, (shape.tokens,), generator=seed)
    return Inputs(
        shape=shape,
        o=o.bfloat16(),
        positions=positions,
        weight=(weight / shape.group_dim**0.5).bfloat16(),
        rotary=rotary_embedding(),
    )


def _angles(cos_sin: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, [T, 1, rope_dim / 2], from the cache that the layer itself reads."""
    cos, sin = cos_sin.double()[positions].unsqueeze(1).chunk(2, dim=-1)
    return cos, sin


def _split(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The lanes of each head without and with a position, in float64."""
    o, nope_dim = inputs.o.double(), inputs.shape.nope_dim
    return o[..., :nope_dim], o[..., nope_dim:]


def _pairs(x: torch.Tensor) -> torch.Tensor:
    """Neighbouring lanes as pairs: GPT-J's layout."""
    return x.reshape(*x.shape[:-1], -1, 2)


def _rotate(rope: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Multiply each GPT-J pair, as a complex number, by cos + i sin."""
    pairs = torch.view_as_complex(_pairs(rope))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def _contract(inputs: Inputs, o: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Each group with its own weight; [T, groups * rank]."""
    shape = inputs.shape
    w = (inputs.weight if weight is None else weight).double()
    grouped = o.reshape(shape.tokens, shape.groups, shape.group_dim)
    return torch.stack(
        [grouped[:, g] @ w[g * shape.rank : (g + 1) * shape.rank].T for g in range(shape.groups)],
        dim=1,
    ).flatten(1)


def _unrotated(inputs: Inputs) -> torch.Tensor:
    """The attention output with its rotation undone: the conjugate of the forward one."""
    cos, sin = _angles(inputs.cos_sin, inputs.positions)
    nope, rope = _split(inputs)
    return torch.cat((nope, _rotate(rope, cos, -sin)), dim=-1)


def _reference(inputs: Inputs) -> torch.Tensor:
    return _contract(inputs, _unrotated(inputs))


def _bound(inputs: Inputs) -> torch.Tensor:
    shape = inputs.shape
    x = _unrotated(inputs).abs()
    in_rope = torch.zeros_like(x)
    in_rope[..., shape.nope_dim :] = x[..., shape.nope_dim :]
    pair_sums = torch.zeros_like(x)
    pairs = _pairs(_split(inputs)[1].abs()).sum(-1)
    pair_sums[..., shape.nope_dim :] = pairs.repeat_interleave(2, dim=-1)
    w = inputs.weight.double().abs()
    total = (
        U_BF16 * _reference(inputs).abs()
        + U_BF16 * _contract(inputs, in_rope, w)
        + 4 * U_FP32 * _contract(inputs, pair_sums, w)
        + shape.group_dim * U_FP32 * _contract(inputs, x, w)
    )
    return (1 + U_BF16) * total


def _within(inputs: Inputs, result: torch.Tensor) -> bool:
    error = (result.double() - _reference(inputs)).abs()
    return bool((error <= _bound(inputs)).all())


# --- planted faults: each is the float64 result of a projection with one thing wrong -----------


def _rope_left_in(inputs: Inputs) -> torch.Tensor:
    return _contract(inputs, inputs.o.double())


def _rope_applied_forward(inputs: Inputs) -> torch.Tensor:
    cos, sin = _angles(inputs.cos_sin, inputs.positions)
    nope, rope = _split(inputs)
    return _contract(inputs, torch.cat((nope, _rotate(rope, cos, sin)), dim=-1))


def _rope_on_leading_lanes(inputs: Inputs) -> torch.Tensor:
    cos, sin = _angles(inputs.cos_sin, inputs.positions)
    o, rope_dim = inputs.o.double(), inputs.shape.rope_dim
    rope, nope = o[..., :rope_dim], o[..., rope_dim:]
    return _contract(inputs, torch.cat((_rotate(rope, cos, -sin), nope), dim=-1))


def _neox_pairs(inputs: Inputs) -> torch.Tensor:
    cos, sin = _angles(inputs.cos_sin, inputs.positions)
    nope, rope = _split(inputs)
    first, second = rope.chunk(2, dim=-1)
    turned = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
    return _contract(inputs, torch.cat((nope, turned), dim=-1))


def _cos_and_sin_swapped(inputs: Inputs) -> torch.Tensor:
    cos, sin = _angles(inputs.cos_sin, inputs.positions)
    nope, rope = _split(inputs)
    return _contract(inputs, torch.cat((nope, _rotate(rope, sin, -cos)), dim=-1))


def _position_off_by_one(inputs: Inputs) -> torch.Tensor:
    cos, sin = _angles(inputs.cos_sin, inputs.positions + 1)
    nope, rope = _split(inputs)
    return _contract(inputs, torch.cat((nope, _rotate(rope, cos, -sin)), dim=-1))


def _groups_swapped(inputs: Inputs) -> torch.Tensor:
    shape = inputs.shape
    rolled = inputs.weight.view(shape.groups, shape.rank, shape.group_dim).roll(1, dims=0)
    return _contract(inputs, _unrotated(inputs), rolled.flatten(0, 1))


def _heads_swapped_within_a_group(inputs: Inputs) -> torch.Tensor:
    shape = inputs.shape
    by_head = _unrotated(inputs).view(
        shape.tokens, shape.groups, shape.heads_per_group, shape.head_dim
    )
    return _contract(inputs, by_head.roll(1, dims=2).reshape(shape.tokens, -1))


def _one_lane_dropped(inputs: Inputs) -> torch.Tensor:
    x = _unrotated(inputs).clone()
    x[..., -1] = 0
    return _contract(inputs, x)


def _activations_through_fp8(inputs: Inputs) -> torch.Tensor:
    """What the FP8 path does to its input: blocks of 128, power-of-two scales."""
    x = _unrotated(inputs)
    blocks = x.reshape(*x.shape[:-1], -1, 128)
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-10)
    scale = torch.exp2(torch.ceil(torch.log2(largest / 448.0)))
    quantized = (blocks / scale).float().to(torch.float8_e4m3fn).double() * scale
    return _contract(inputs, quantized.flatten(-2))


FAULTS: dict[str, Fault] = {
    "rope left in": _rope_left_in,
    "rope applied forward": _rope_applied_forward,
    "rope on the leading lanes": _rope_on_leading_lanes,
    "neox pairs": _neox_pairs,
    "cos and sin swapped": _cos_and_sin_swapped,
    "position off by one": _position_off_by_one,
    "groups swapped": _groups_swapped,
    "heads swapped within a group": _heads_swapped_within_a_group,
    "one lane dropped": _one_lane_dropped,
    "activations through fp8": _activations_through_fp8,
}


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.lines("0.22", "0.26")
def test_output_projection_matches_float64(
    line: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    inputs = _inputs(SHAPES[name])
    before = inputs.o.clone()
    # Without the patch this reaches the FP8 path, and that one asks wo_a for a scale: the failure
    # that a user sees. With unreplaced kernels it would fail for want of a GPU, which proves less.
    seen = record_fp8_kernels(line, monkeypatch)
    result = project(
        line,
        monkeypatch,
        inputs.shape,
        attention_output=inputs.o,
        positions=inputs.positions,
        rotary=inputs.rotary,
        wo_a=wo_a_module(inputs.weight),
    )
    assert not seen.quantized
    assert not seen.einsum
    assert result.dtype == torch.bfloat16
    assert result.shape == (inputs.shape.tokens, inputs.shape.groups * inputs.shape.rank)
    error = (result.double() - _reference(inputs)).abs()
    worst = (error / _bound(inputs)).max().item()
    assert worst <= 1, f"{worst:.2f} of the bound"
    assert torch.equal(inputs.o, before), "the attention output was changed in place"


@pytest.mark.parametrize("fault", sorted(FAULTS))
@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.lines("0.22", "0.26")
def test_the_bound_rejects(line: str, name: str, fault: str) -> None:
    """The tolerance above is worth something only while it kills each of these."""
    inputs = _inputs(SHAPES[name])
    assert _within(inputs, _reference(inputs))
    assert not _within(inputs, FAULTS[fault](inputs).bfloat16())


@pytest.mark.lines("0.22", "0.26")
def test_it_undoes_the_rotation_of_the_embedding_itself(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No reference of ours: rotate with vLLM's own forward_native, project, get the input back.

    With one head per group and an identity for a weight, the projection returns its input. The
    rotated lanes were rounded to BF16 three times on the way (rotated, turned back, projected),
    each time by at most u times the length of their pair, which a rotation keeps.
    """
    shape = Shape(groups=2, heads_per_group=1, rank=Shape().head_dim)
    seed = torch.Generator().manual_seed(44847)
    start = torch.randn(shape.tokens, shape.heads, shape.head_dim, generator=seed).bfloat16()
    positions = torch.tensor([1, 2, 77, 500, MAX_POSITION - 1])
    rotary: Any = rotary_embedding()
    rotated, _ = rotary.forward_native(positions, start.clone(), None)
    assert not torch.equal(rotated, start)
    record_fp8_kernels(line, monkeypatch)
    result = project(
        line,
        monkeypatch,
        shape,
        attention_output=rotated,
        positions=positions,
        rotary=rotary,
        wo_a=wo_a_module(torch.eye(shape.head_dim).repeat(shape.groups, 1).bfloat16()),
    ).view_as(start)
    nope = shape.nope_dim
    assert torch.equal(result[..., :nope], start[..., :nope])
    lengths = _pairs(start[..., nope:].double()).norm(dim=-1)
    allowed = 3 * U_BF16 * lengths.repeat_interleave(2, dim=-1)
    assert ((result - start)[..., nope:].double().abs() <= allowed).all()


@pytest.mark.lines("0.26")
def test_no_tokens_is_not_an_error(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(tokens=0)
    record_fp8_kernels(line, monkeypatch)
    result = project(
        line,
        monkeypatch,
        shape,
        attention_output=torch.zeros(0, shape.heads, shape.head_dim, dtype=torch.bfloat16),
        positions=torch.zeros(0, dtype=torch.int64),
        rotary=rotary_embedding(),
        wo_a=wo_a_module(_inputs(Shape()).weight),
    )
    assert result.shape == (0, shape.groups * shape.rank)


def test_an_fp8_weight_still_takes_the_fp8_path(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untouched: the same arguments reach both kernels, and each is called once."""
    shape = Shape()
    inputs = _inputs(shape)
    seen = record_fp8_kernels(line, monkeypatch)
    scale = torch.ones(4, 12)
    wo_a = wo_a_module(inputs.weight.to(torch.float8_e4m3fn), weight_scale_inv=scale)
    project(
        line,
        monkeypatch,
        shape,
        attention_output=inputs.o,
        positions=inputs.positions,
        rotary=inputs.rotary,
        wo_a=wo_a,
    )
    (quantized,) = seen.quantized
    assert torch.equal(quantized["o"], inputs.o)
    assert quantized["positions"] is inputs.positions
    assert quantized["cos_sin_cache"] is inputs.rotary.cos_sin_cache
    assert quantized["n_groups"] == shape.groups
    assert quantized["heads_per_group"] == shape.heads_per_group
    assert quantized["nope_dim"] == shape.nope_dim
    assert quantized["rope_dim"] == shape.rope_dim
    assert quantized["tma_aligned_scales"] is False
    (einsum,) = seen.einsum
    assert einsum["equation"] == "bhr,hdr->bhd"
    assert einsum["o"] is seen.o_fp8
    assert einsum["o_scale"] is seen.o_scale
    assert einsum["weight"] is wo_a.weight
    assert einsum["weight_scale"] is wo_a.weight_scale_inv


@pytest.mark.lines("0.22", "0.26")
def test_a_weight_that_is_neither_is_not_taken_for_bf16(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repacked weight (Marlin makes int32 of it) without a scale stays an error."""
    shape = Shape()
    inputs = _inputs(shape)
    record_fp8_kernels(line, monkeypatch)
    with pytest.raises(AttributeError, match="weight_scale"):
        project(
            line,
            monkeypatch,
            shape,
            attention_output=inputs.o,
            positions=inputs.positions,
            rotary=inputs.rotary,
            wo_a=wo_a_module(torch.zeros(inputs.weight.shape, dtype=torch.int32)),
        )


@pytest.mark.lines("0.22", "0.26")
def test_the_bf16_path_compiles_without_a_graph_break(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM traces the draft model as one graph; a break there costs its CUDA graphs.

    An earlier form of this patch asked for the scale with getattr in forward and did just that
    (reported as 8.5 to 9.7 times slower decoding). On 0.22.1 the wrapper's forward calls the
    attention op first, which is not ours to trace, so its torch path is compiled alone.
    """
    inputs = _inputs(Shape())
    wo_a = wo_a_module(inputs.weight)
    record_fp8_kernels(line, monkeypatch)

    def run(o: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if line == "0.22":
            from vllm.models.deepseek_v4.attention import rocm_inv_rope_einsum

            z: torch.Tensor = rocm_inv_rope_einsum(
                inputs.rotary,
                o,
                positions,
                inputs.shape.rope_dim,
                inputs.shape.groups,
                inputs.shape.rank,
                wo_a,
            )
            return z.flatten(1)
        return project(
            line,
            monkeypatch,
            inputs.shape,
            attention_output=o,
            positions=positions,
            rotary=inputs.rotary,
            wo_a=wo_a,
        )

    with torch.compiler.set_stance("default"):
        compiled = torch.compile(run, fullgraph=True, backend="eager")
        result = compiled(inputs.o, inputs.positions)
    assert _within(inputs, result)
