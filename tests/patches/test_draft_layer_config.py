"""A BF16 draft block needs no code to be found: an ignore list says it, by vLLM's own matcher.

The draft model takes the target's quantization config (config/speculative.py:555-558 in 0.22.1),
so without a word about it the matcher gives a BF16 block quantized parameters and loading fails.
The carried patches therefore leave out the detection half of vllm-project/vllm#43319; the
checkpoint's config ignores the layer instead, by its index, which is num_hidden_layers.

These tests take the layer's name from the real constructor of the draft layer
(models/deepseek_v4/nvidia/mtp.py:64 in 0.22.1) and resolve the modules below it with the real
CompressedTensorsConfig. The names below a layer are those of nvidia/model.py and attention.py:
`attn` and `ffn` of the decoder layer, `fused_wqa_wkv`, `wq_b`, `wo_a`, `wo_b` of the attention.
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

LAYERS = 43
DRAFT_IGNORE = rf"re:.*\.layers\.{LAYERS}\..*"
ATTENTION = r"re:.*\.attn\.(fused_wqa_wkv|wq_b|wo_a|wo_b)$"
EVERY_NAME = r"re:.*\.ffn\.experts\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj)$"
OLD_NAMES = r"re:.*\.ffn\.experts\.\d+\.(gate_proj|up_proj|down_proj)$"
ATTENTION_MODULES = ("attn.fused_wqa_wkv", "attn.wq_b", "attn.wo_a", "attn.wo_b")
UNQUANTIZED = "unquantized"


def _config(ignore: list[str], *, experts: str = EVERY_NAME) -> CompressedTensorsConfig:
    """The two groups of the model card: FP8 block attention, NVFP4 experts."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    fp8: dict[str, object] = {"num_bits": 8, "type": "float", "symmetric": True}
    fp4 = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "symmetric": True,
    }
    config = CompressedTensorsConfig.from_config(
        {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "config_groups": {
                "group_0": {
                    "targets": [ATTENTION],
                    "weights": {
                        **fp8,
                        "strategy": "block",
                        "block_structure": [128, 128],
                        "dynamic": False,
                    },
                    "input_activations": {
                        **fp8,
                        "strategy": "group",
                        "group_size": 128,
                        "dynamic": True,
                    },
                    "format": "float-quantized",
                },
                "group_1": {
                    "targets": [experts],
                    "weights": {**fp4, "dynamic": False},
                    "input_activations": {**fp4, "dynamic": "local"},
                    "format": "nvfp4-pack-quantized",
                },
            },
            "ignore": ["lm_head", *ignore],
        }
    )
    config.packed_modules_mapping = {}
    return config


def _linear_method(config: CompressedTensorsConfig, name: str) -> str:
    """What vLLM would make of a linear layer of this name."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, UnquantizedLinearMethod

    layer = object.__new__(ColumnParallelLinear)
    nn.Module.__init__(layer)
    method = config.get_quant_method(layer, name)
    if isinstance(method, UnquantizedLinearMethod):
        return UNQUANTIZED
    return type(layer.scheme).__name__


def _moe_method(config: CompressedTensorsConfig, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What vLLM would make of routed experts of this name, before it looks for a kernel."""
    import importlib

    from vllm.model_executor.layers.fused_moe import RoutedExperts

    package = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
    selection = importlib.import_module(f"{package}.compressed_tensors_moe")
    nvfp4 = importlib.import_module(f"{package}.compressed_tensors_moe_w4a4_nvfp4")

    def named(result: str) -> Any:
        return lambda *_args, **_kwargs: result

    monkeypatch.setattr(selection, "UnquantizedFusedMoEMethod", named(UNQUANTIZED))
    monkeypatch.setattr(nvfp4, "CompressedTensorsW4A4Nvfp4MoEMethod", named("nvfp4"))
    layer = object.__new__(RoutedExperts)
    nn.Module.__init__(layer)
    layer.moe_config = None
    # What DeepSeek V4 passes for its checkpoint's names; 0.33.0 probes these.
    layer.ckpt_gate_proj_name = "w1"
    layer.ckpt_up_proj_name = "w3"
    layer.ckpt_down_proj_name = "w2"
    return str(config.get_quant_method(layer, name))


@pytest.fixture(autouse=True)
def _scheme_needs_a_model_and_a_gpu(_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import get_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    monkeypatch.setattr(
        get_current_vllm_config(), "model_config", SimpleNamespace(dtype=torch.bfloat16)
    )
    monkeypatch.setattr(
        current_platform, "get_device_capability", lambda *_: DeviceCapability(10, 0)
    )


@pytest.fixture
def draft(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every name that the real draft layer gives the parts it builds, its decoder layer's first."""
    from vllm.models.deepseek_v4.nvidia import mtp

    names: list[str] = []

    def part(*args: object, prefix: str = "", **_kwargs: object) -> nn.Module:
        if prefix:
            names.append(prefix)
        return nn.Identity()

    def decoder_layer(_vllm_config: object, prefix: str, **_kwargs: object) -> nn.Module:
        names.insert(0, prefix)
        return nn.Identity()

    for name in ("RMSNorm", "ReplicatedLinear"):
        monkeypatch.setattr(mtp, name, part)
    for name in ("SharedHead", "HCHeadOp"):
        monkeypatch.setattr(mtp, name, lambda *_args, **_kwargs: nn.Identity(), raising=False)
    monkeypatch.setattr(mtp, "DeepseekV4DecoderLayer", decoder_layer)
    hf_config = SimpleNamespace(rms_norm_eps=1e-6, hidden_size=8, hc_eps=1e-6, hc_mult=2)
    mtp.DeepSeekV4MultiTokenPredictorLayer(
        SimpleNamespace(
            speculative_config=SimpleNamespace(
                draft_model_config=SimpleNamespace(hf_config=hf_config)
            ),
            quant_config=None,
            kernel_config=SimpleNamespace(moe_backend="auto", enable_jit_warmup=False),
        ),
        torch.zeros(1, dtype=torch.int32),
        f"model.layers.{LAYERS}",
    )
    assert names[0] == f"model.layers.{LAYERS}"
    return names


def test_the_ignore_list_leaves_the_draft_layer_unquantized(
    draft: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config([DRAFT_IGNORE])
    layer, *projections = draft
    for name in (*projections, *(f"{layer}.{module}" for module in ATTENTION_MODULES)):
        assert _linear_method(config, name) == UNQUANTIZED, name
    assert _moe_method(config, f"{layer}.ffn.experts", monkeypatch) == UNQUANTIZED


def test_without_it_the_draft_layer_is_quantized(
    draft: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the entry is what makes the difference."""
    config = _config([r"re:.*mtp\..*"])
    for module in ATTENTION_MODULES:
        assert _linear_method(config, f"{draft[0]}.{module}") == "CompressedTensorsW8A8Fp8"
    assert _moe_method(config, f"{draft[0]}.ffn.experts", monkeypatch) == "nvfp4"


@pytest.mark.parametrize("layer", [0, 3, 4, LAYERS - 1])
def test_every_other_layer_stays_quantized(monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    """Also the ones whose index is part of the ignored one."""
    config = _config([DRAFT_IGNORE])
    for module in ATTENTION_MODULES:
        name = f"model.layers.{layer}.{module}"
        assert _linear_method(config, name) == "CompressedTensorsW8A8Fp8"
    name = f"model.layers.{layer}.ffn.experts"
    assert _moe_method(config, name, monkeypatch) == "nvfp4"


@pytest.mark.lines("0.22", "0.26")
def test_an_unanchored_e_proj_also_ignores_gate_proj(monkeypatch: pytest.MonkeyPatch) -> None:
    """Harm: `re:.*e_proj$` matches `gate_proj`, one of three projections that must agree."""
    config = _config([r"re:.*e_proj$"])
    with pytest.raises(ValueError, match="same quantization scheme"):
        _moe_method(config, "model.layers.0.ffn.experts", monkeypatch)


def test_experts_named_the_old_way_only(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Harm: 0.32.0 began to probe w1, w2, w3, so the card's own names find no experts there."""
    config = _config([DRAFT_IGNORE], experts=OLD_NAMES)
    found = _moe_method(config, "model.layers.0.ffn.experts", monkeypatch)
    assert found == (UNQUANTIZED if line == "0.33" else "nvfp4")
