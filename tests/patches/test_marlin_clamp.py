"""Marlin applies the SwiGLU limit of the model: from the layer's config to the activation.

DeepSeek V4 clamps inside SwiGLU: gate at most L, up within [-L, L], L = swiglu_limit = 10. Marlin
of 0.22.1 can do so (fused_moe/experts/marlin_moe.py:162) but never hears of the limit: the NVFP4
config drops it (fused_moe/oracle/nvfp4.py:478-484), and the W4A16 method passes none
(compressed_tensors_moe_wna16_marlin.py:552-579, and :466 for its modular kernels). Both arrive in
0.26.0 (oracle/nvfp4.py:487 and compressed_tensors_moe_wna16_marlin.py:540).
NVFP4 was found by vllm-project/vllm#45836; W4A16 is the fault of sgl-project/sglang#27328.

The real MarlinExperts and fused_marlin_moe run on a CPU. The GEMM, the token sort and the sum over
experts are replaced, so that a test can hand in what the first GEMM yields and see what the second
one gets: the activation.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from .nvfp4_selection import SWIGLU_LIMIT as LIMIT
from .nvfp4_selection import select_backend

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS = 3, 64, 32, 2
# One rounding of each BF16 step: clamp is exact, then silu, product and the store.
REL_TOL = 3 * 2.0**-8


def _gate_up() -> torch.Tensor:
    """Both halves reach past the limit, on both sides."""
    seed = torch.Generator().manual_seed(45836)
    return (torch.randn(TOKENS, 2 * INTERMEDIATE, generator=seed) * 3 * LIMIT).bfloat16()


def _swiglu(gate_up: torch.Tensor, limit: float | None) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


class _NothingSet:
    """A MoE config without a value in it.

    0.33.0 falls back from the quant config to the limit in here; the limit must come through the
    quant config, as on the other lines.
    """

    def __getattr__(self, name: str) -> None:
        return None


class _Marlin:
    """The real MoE module of the line with its GPU operations replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.model_executor.layers.fused_moe.experts import marlin_moe

        self.activations: list[torch.Tensor] = []
        self._calls = 0
        monkeypatch.setattr(marlin_moe.ops, "moe_wna16_marlin_gemm", self._gemm)
        monkeypatch.setattr(marlin_moe.ops, "moe_sum", lambda _partial, out: out.zero_())
        monkeypatch.setattr(marlin_moe, "moe_align_block_size", self._align)
        makers = ("marlin_make_workspace_new", "get_marlin_workspace")
        maker = next(name for name in makers if hasattr(marlin_moe, name))
        monkeypatch.setattr(marlin_moe, maker, lambda *_: torch.zeros(1, dtype=torch.int32))
        # From 0.24.0 the activation is a compiled operation; before, torch.
        for name, function in {
            "silu_and_mul": self._silu_and_mul,
            "silu_and_mul_with_clamp": self._silu_and_mul_with_clamp,
        }.items():
            monkeypatch.setattr(torch.ops._C, name, function, raising=False)

    def _gemm(self, a: torch.Tensor, c: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        self._calls += 1
        if self._calls == 1:
            c.copy_(_gate_up())
        else:
            self.activations.append(a.clone())
            c.zero_()
        return c

    @staticmethod
    def _align(ids: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, ...]:
        return ids.flatten(), ids.flatten(), torch.tensor([ids.numel()])

    @staticmethod
    def _silu_and_mul(out: torch.Tensor, gate_up: torch.Tensor) -> None:
        out.copy_(_swiglu(gate_up, None))

    @staticmethod
    def _silu_and_mul_with_clamp(
        out: torch.Tensor, gate_up: torch.Tensor, limit: float, alpha: float, beta: float
    ) -> None:
        assert (alpha, beta) == (1.0, 0.0)
        out.copy_(_swiglu(gate_up, limit))

    def run_experts(self, quant_config: Any) -> torch.Tensor:
        """Through the modular kernel's experts, as NVFP4 always goes."""
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation
        from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts

        experts = MarlinExperts(moe_config=_NothingSet(), quant_config=quant_config)
        experts.apply(
            output=torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16),
            **_problem(),
            activation=MoEActivation.SILU,
            global_num_experts=EXPERTS,
            expert_map=None,
            a1q_scale=None,
            a2_scale=None,
            workspace13=torch.zeros(TOKENS * HIDDEN, dtype=torch.bfloat16),
            workspace2=torch.zeros(TOKENS * HIDDEN, dtype=torch.bfloat16),
            expert_tokens_meta=None,
            apply_router_weight_on_input=False,
        )
        return self.activation

    @property
    def activation(self) -> torch.Tensor:
        (result,) = self.activations
        return result


def _problem() -> dict[str, torch.Tensor]:
    """Weights in Marlin's packed shapes; their content never matters here."""
    return {
        "hidden_states": torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16),
        "w1": torch.zeros(EXPERTS, HIDDEN // 16, 4 * INTERMEDIATE, dtype=torch.int32),
        "w2": torch.zeros(EXPERTS, INTERMEDIATE // 16, 2 * HIDDEN, dtype=torch.int32),
        "topk_weights": torch.ones(TOKENS, 1),
        "topk_ids": torch.zeros(TOKENS, 1, dtype=torch.int32),
    }


def _close(result: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool(((result.double() - wanted).abs() <= REL_TOL * wanted.abs() + 1e-30).all())


def _assert_clamped(activation: torch.Tensor, limit: float | None) -> None:
    gate_up = _gate_up()
    largest = activation.abs().max().item()
    fits = _close(activation, _swiglu(gate_up, limit))
    assert fits, f"limit {limit} was not applied: the largest activation is {largest:.0f}"
    others: list[float | None] = [None, LIMIT, LIMIT * 1.01, LIMIT * 0.99]
    for other in others:
        if other != limit:
            fits = _close(activation, _swiglu(gate_up, other))
            assert not fits, f"a limit of {other} fits as well: the fixture tells nothing"


def _nvfp4_config(limit: float | None) -> Any:
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import (
        NvFp4MoeBackend,
        make_nvfp4_moe_quant_config,
    )

    one = torch.ones(1)
    return make_nvfp4_moe_quant_config(
        backend=NvFp4MoeBackend.MARLIN,
        w13_scale=one,
        w2_scale=one,
        w13_scale_2=one,
        w2_scale_2=one,
        a13_scale=one,
        a2_scale=one,
        swiglu_limit=limit,
    )


@pytest.mark.parametrize("limit", [LIMIT, None])
def test_nvfp4_marlin_applies_the_swiglu_limit(
    monkeypatch: pytest.MonkeyPatch, limit: float | None
) -> None:
    activation = _Marlin(monkeypatch).run_experts(_nvfp4_config(limit))
    _assert_clamped(activation, limit)


def _wna16_method() -> Any:
    from vllm.scalar_type import scalar_types

    module = importlib.import_module(
        "vllm.model_executor.layers.quantization.compressed_tensors."
        "compressed_tensors_moe.compressed_tensors_moe_wna16_marlin"
    )
    method = object.__new__(module.CompressedTensorsWNA16MarlinMoEMethod)
    method.num_bits = 4
    method.group_size = 128
    method.kernel_backend = "Marlin"
    method.quant_type = scalar_types.uint4b8
    method.marlin_input_dtype = None
    method.is_k_full = True
    method.moe = SimpleNamespace(disable_inplace=True)
    return method


def _wna16_layer(limit: float | None) -> SimpleNamespace:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    problem = _problem()
    scale = torch.ones(EXPERTS, 1, 1)
    return SimpleNamespace(
        w13_weight_packed=problem["w1"],
        w2_weight_packed=problem["w2"],
        w13_weight_scale=scale,
        w2_weight_scale=scale,
        w13_weight_g_idx=None,
        w2_weight_g_idx=None,
        w13_g_idx_sort_indices=None,
        w2_g_idx_sort_indices=None,
        apply_router_weight_on_input=False,
        global_num_experts=EXPERTS,
        activation=MoEActivation.SILU,
        expert_map=None,
        workspace=torch.zeros(1, dtype=torch.int32),
        swiglu_limit=limit,
        swiglu_alpha=None,
        swiglu_beta=None,
    )


@pytest.mark.parametrize("limit", [LIMIT, None])
@pytest.mark.parametrize("route", ["direct", "modular"])
@pytest.mark.lines("0.22")
def test_wna16_marlin_applies_the_swiglu_limit(
    monkeypatch: pytest.MonkeyPatch, route: str, limit: float | None
) -> None:
    """Direct is the method's own apply; modular is what data and expert parallelism build."""
    marlin, method, layer = _Marlin(monkeypatch), _wna16_method(), _wna16_layer(limit)
    if route == "direct":
        problem = _problem()
        method.apply(
            layer,
            problem["hidden_states"],
            problem["topk_weights"],
            problem["topk_ids"],
            shared_experts=None,
            shared_experts_input=None,
        )
    else:
        marlin.run_experts(method.get_fused_moe_quant_config(layer))
    _assert_clamped(marlin.activation, limit)


@pytest.mark.lines("0.22")
def test_a_wna16_layer_without_the_attribute_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losing the limit in silence is the fault; not finding it must not be silent either."""
    _Marlin(monkeypatch)
    layer = _wna16_layer(None)
    del layer.swiglu_limit
    with pytest.raises(AttributeError, match="swiglu_limit"):
        _wna16_method().get_fused_moe_quant_config(layer)


@pytest.mark.lines("0.26")
def test_wna16_limit_landed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why line 0.26 carries no such patch. 0.33.0 has folded the method into another class."""
    config = _wna16_method().get_fused_moe_quant_config(_wna16_layer(LIMIT))
    _assert_clamped(_Marlin(monkeypatch).run_experts(config), LIMIT)


# --- selection: a backend that clamps may be chosen for a model with a limit -------------------


def test_a_limit_leaves_trtllm_first_and_marlin_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"FLASHINFER_TRTLLM", "MARLIN"}
    assert select_backend(monkeypatch, supported=both) == "FLASHINFER_TRTLLM"
    assert select_backend(monkeypatch, supported={"MARLIN"}) == "MARLIN"
    assert select_backend(monkeypatch, supported=both, requested="marlin") == "MARLIN"


@pytest.mark.lines("0.22")
def test_a_limit_still_refuses_what_cannot_clamp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vLLM CUTLASS experts of this release know no limit and stay refused."""
    with pytest.raises(NotImplementedError):
        select_backend(monkeypatch, supported={"VLLM_CUTLASS", "FLASHINFER_CUTLASS", "EMULATION"})
