"""`is_static_input_scheme` is a bool, also for a group without input_activations.

`input_quant and not input_quant.dynamic` is None when input_quant is None. The W8A16 scheme keeps
it and, for blocks, stops on `assert self.is_static_input_scheme is False`
(schemes/compressed_tensors_w8a16_fp8.py:122 in 0.22.1 and 0.33.0). The expression stands in
compressed_tensors.py at 666, 679, 700 (0.22.1), 829, 842, 863 (0.26.0), 903, 916, 937 (0.33.0).
The folklore that it yields a QuantizationArgs is wrong: `x and not y` never is x when x is true.
Found by vllm-project/vllm#43248.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

FP8_BLOCK = {
    "num_bits": 8,
    "type": "float",
    "strategy": "block",
    "block_structure": [128, 128],
    "symmetric": True,
    "dynamic": False,
}
FP8_TENSOR = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
}
DYNAMIC_GROUP = {
    "num_bits": 8,
    "type": "float",
    "strategy": "group",
    "group_size": 128,
    "symmetric": True,
    "dynamic": True,
}
TARGET = r"re:.*\.attn\.wo_a$"


def _config(
    weights: dict[str, object], input_activations: dict[str, object] | None
) -> CompressedTensorsConfig:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    return CompressedTensorsConfig.from_config(
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {
                "group_0": {
                    "targets": [TARGET],
                    "weights": dict(weights),
                    "input_activations": input_activations and dict(input_activations),
                    "format": "float-quantized",
                }
            },
            "ignore": [],
        }
    )


def _scheme(config: CompressedTensorsConfig) -> Any:
    """The scheme that vLLM picks for the group's layers, from the config as parsed."""
    group = config.target_scheme_map[TARGET]
    return config._get_scheme_from_parts(
        weight_quant=group["weights"],
        input_quant=group["input_activations"],
        format="float-quantized",
    )


@pytest.fixture(autouse=True)
def _model_dtype(_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schemes ask the current config for the model's dtype; there is no model here."""
    from vllm.config import get_current_vllm_config

    monkeypatch.setattr(
        get_current_vllm_config(), "model_config", SimpleNamespace(dtype=torch.bfloat16)
    )


@pytest.fixture
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """W8A8 needs compute capability 8.9; the choice is made before any kernel."""
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    monkeypatch.setattr(
        current_platform, "get_device_capability", lambda *_: DeviceCapability(9, 0)
    )


def test_weight_only_fp8_block_scheme_is_not_static() -> None:
    """The flag, and what hangs on it: the weights are processed past the scheme's assert."""
    scheme = _scheme(_config(FP8_BLOCK, None))
    assert type(scheme).__name__ == "CompressedTensorsW8A16Fp8"
    assert scheme.is_static_input_scheme is False, repr(scheme.is_static_input_scheme)

    processed: list[nn.Module] = []
    scheme.linear_kernel = SimpleNamespace(process_weights_after_loading=processed.append)
    layer: Any = nn.Module()
    scale = torch.ones(2, 3)
    layer.register_parameter("weight_scale", nn.Parameter(scale, requires_grad=False))
    scheme.process_weights_after_loading(layer)
    assert processed == [layer]
    assert torch.equal(layer.weight_scale_inv, scale)


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize(
    ("weights", "inputs", "static"),
    [(FP8_BLOCK, DYNAMIC_GROUP, False), (FP8_TENSOR, FP8_TENSOR, True)],
    ids=["dynamic", "static"],
)
def test_a_group_with_inputs_keeps_its_meaning(
    weights: dict[str, object],
    inputs: dict[str, object],
    static: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The W8A8 site: a literal bool with or without the patch, and the right one."""
    from vllm.model_executor.layers.quantization.compressed_tensors import (
        compressed_tensors as module,
    )

    built: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "CompressedTensorsW8A8Fp8", _recorder(module, built))
    _scheme(_config(weights, inputs))
    assert [call["is_static_input_scheme"] for call in built] == [static]
    assert isinstance(built[0]["is_static_input_scheme"], bool)


def _recorder(module: Any, built: list[dict[str, Any]]) -> type:
    """The W8A8 scheme class with a constructor that only notes how it was called.

    Its own constructor picks a GEMM kernel for the GPU that is not there.
    """

    class Recorder(module.CompressedTensorsW8A8Fp8):  # type: ignore[misc]
        def __init__(self, **kwargs: object) -> None:
            built.append(kwargs)

    return Recorder
