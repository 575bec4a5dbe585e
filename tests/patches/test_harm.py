"""What a refused patch would do: each test shows the harm, on the pinned vLLM or on torch itself.

A refusal in patches/vllm/dispositions.toml names its test here. These tests are green with and
without our patches; they turn red when the harm is gone and the refusal should be read again.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from .nvfp4_selection import select_backend


def _either_scale(layer: Any) -> torch.Tensor:
    """The published form: vllm-project/vllm#43319's second commit and two installers have it."""
    scale: torch.Tensor = getattr(layer, "weight_scale_inv", None) or layer.weight_scale
    return scale


def test_or_on_a_block_scale_raises() -> None:
    """Every FP8 checkpoint of DeepSeek itself has this attribute, with many elements."""
    layer = SimpleNamespace(weight_scale_inv=torch.ones(4, 32))
    with pytest.raises(RuntimeError, match="Boolean value of Tensor"):
        _either_scale(layer)


def test_or_on_a_single_zero_takes_the_other_scale() -> None:
    """With one element it does not even raise."""
    other = torch.ones(1)
    layer = SimpleNamespace(weight_scale_inv=torch.zeros(1), weight_scale=other)
    assert _either_scale(layer) is other


def test_skipping_the_repack_for_bmm_skips_deep_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """sm120_skip_marlin_for_bmm returns before the kernel has processed the weights.

    That is where DeepGEMM gives wo_a its three dimensions and its scales the layout that
    fp8_einsum reads (kernels/linear/scaled_mm/deep_gemm.py, is_bmm). Its early return is planted
    here in a subclass; the stock method hands the layer to the kernel.
    """
    module = importlib.import_module(
        "vllm.model_executor.layers.quantization.compressed_tensors."
        "schemes.compressed_tensors_w8a8_fp8"
    )
    stock: Any = module.CompressedTensorsW8A8Fp8

    class WithTheDiff(stock):  # type: ignore[misc]
        def process_weights_after_loading(self, layer: Any) -> None:
            if getattr(layer, "is_bmm", False):
                layer.input_scale = None
                return
            super().process_weights_after_loading(layer)

    def processed_by(cls: Any) -> list[object]:
        seen: list[object] = []
        scheme = object.__new__(cls)
        scheme.strategy = module.QuantizationStrategy.BLOCK
        scheme.is_static_input_scheme = False
        scheme.fp8_linear = SimpleNamespace(process_weights_after_loading=seen.append)
        wo_a: Any = nn.Module()
        wo_a.is_bmm = True
        scheme.process_weights_after_loading(wo_a)
        return seen

    assert len(processed_by(stock)) == 1
    assert processed_by(WithTheDiff) == []


BLACKWELL = {"FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS", "MARLIN"}


@pytest.mark.lines("0.22", "0.26")
def test_the_force_marlin_variable_displaces_the_fp4_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """VLLM_TEST_FORCE_FP8_MARLIN takes a device with FP4 tensor cores to BF16 arithmetic.

    The model card exports it for B300 as well. It is read at oracle/nvfp4.py:309 (0.22.1) and
    :268 (0.26.0), before any kernel is asked; as it is a test switch, nothing says so.
    """
    assert select_backend(monkeypatch, supported=BLACKWELL) == "FLASHINFER_TRTLLM"
    monkeypatch.setenv("VLLM_TEST_FORCE_FP8_MARLIN", "1")
    assert select_backend(monkeypatch, supported=BLACKWELL) == "MARLIN"


@pytest.mark.lines("0.33")
def test_the_force_marlin_variable_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed in 0.29.0: a preset that sets it asks for something that does not happen."""
    monkeypatch.setenv("VLLM_TEST_FORCE_FP8_MARLIN", "1")
    assert select_backend(monkeypatch, supported=BLACKWELL) == "FLASHINFER_TRTLLM"


def test_marlin_experts_ask_for_four_blocks_per_sm_already(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workspace x4 patch multiplies inside the allocator, so experts would get x16.

    The kernel never uses more than 4 per multiprocessor: test_marlin_kernel runs its scheduler.
    """
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    class AskedError(Exception):
        pass

    def workspace(_device: object, max_blocks_per_sm: int = 1) -> torch.Tensor:
        raise AskedError(max_blocks_per_sm)

    if line == "0.33":
        # The experts ask one door further on, which asks the allocator.
        monkeypatch.setattr(marlin_utils, "marlin_make_workspace_new", workspace)
    else:
        monkeypatch.setattr(marlin_moe, "marlin_make_workspace_new", workspace)
    given: dict[str, object] = {
        "hidden_states": torch.zeros(1, 64, dtype=torch.bfloat16),
        "w1": torch.zeros(1, 4, 128, dtype=torch.int32),
        "w2": torch.zeros(1, 2, 128, dtype=torch.int32),
        "num_topk": 1,
    }
    # What else a line requires is not looked at before the workspace is asked for.
    required = {
        name: None
        for name, parameter in inspect.signature(marlin_moe._fused_marlin_moe).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    with pytest.raises(AskedError) as asked:
        marlin_moe._fused_marlin_moe(**(required | given))
    assert asked.value.args == (4,)


def test_marlin_comes_last_of_the_block_fp8_kernels_with_native_ones() -> None:
    """#43722 and the sm_120 scale diff patch a kernel that is not chosen.

    Selection takes the first that fits. On every SKU here DeepGEMM or CUTLASS fits before Marlin
    is asked (kernels/linear/__init__.py:302 in 0.22.1, :358 in 0.26.0, :497 in 0.33.0).
    """
    from vllm.model_executor.kernels import linear
    from vllm.platforms.interface import PlatformEnum

    names = [k.__name__ for k in linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CUDA]]
    marlin = names.index("MarlinFP8ScaledMMLinearKernel")
    for native in ("DeepGemmFp8BlockScaledMMKernel", "CutlassFp8BlockScaledMMKernel"):
        assert names.index(native) < marlin


@pytest.mark.lines("0.26", "0.33")
def test_triton_is_not_what_selection_takes_where_native_kernels_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tuned configurations of #41834 are read by Triton kernels only."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
    from vllm.platforms.interface import PlatformEnum

    names = [k.__name__ for k in linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CUDA]]
    triton = names.index("TritonFp8BlockScaledMMKernel")
    for native in ("DeepGemmFp8BlockScaledMMKernel", "CutlassFp8BlockScaledMMKernel"):
        assert names.index(native) < triton
    assert not [backend for backend in NvFp4MoeBackend if "TRITON" in backend.name]
    assert select_backend(monkeypatch, supported=BLACKWELL - {"FLASHINFER_TRTLLM"}) == (
        "FLASHINFER_CUTLASS"
    )


def test_this_lines_torch_is_not_the_vendors() -> None:
    """Which calls itself 2.12 but lacks what 2.12 has; vLLM asks for the version only."""
    from torch.fx.passes.split_module import split_module
    from vllm.compilation import backends

    has_it = "tuple_return" in inspect.signature(split_module).parameters
    assert backends.is_torch_equal_or_newer("2.12.0.dev") == has_it
    assert not torch.__version__.startswith("2.12.")


def test_the_image_makes_no_checkpoint() -> None:
    """compressed-tensors is there to read them; what calibrates and quantizes is not."""
    assert importlib.util.find_spec("compressed_tensors") is not None
    assert importlib.util.find_spec("llmcompressor") is None
