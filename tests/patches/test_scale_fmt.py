"""scale_fmt may be absent from the config: four shapes of it, through the real constructor.

0.22.1 indexes `config.quantization_config["scale_fmt"]` (models/deepseek_v4/nvidia/model.py:754).
Only DeepSeek's own checkpoints write that key. 0.23.0 no longer reads it (its indexer has
"ue8m0" as a constant, models/deepseek_v4/attention.py:709), so later lines have no subject here.
Found by vllm-project/vllm#43288; a config without any quantization_config is our addition.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

pytestmark = pytest.mark.lines("0.22")


def _hf_config(**quantization: object) -> SimpleNamespace:
    """What the constructor reads of a DeepSeek V4 config, at its smallest."""
    return SimpleNamespace(
        hidden_size=64,
        num_attention_heads=4,
        q_lora_rank=8,
        o_lora_rank=8,
        head_dim=512,
        qk_rope_head_dim=64,
        o_groups=2,
        sliding_window=128,
        num_hidden_layers=1,
        compress_ratios=[0],
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
        rope_scaling=None,
        rope_theta=10000.0,
        rope_parameters={"rope_type": "default"},
        **quantization,
    )


def _scale_fmt(monkeypatch: pytest.MonkeyPatch, config: SimpleNamespace) -> Any:
    """Build the real DeepseekV4Attention around stand-ins for its submodules."""
    from vllm.models.deepseek_v4.nvidia import model

    def stand_in(*_args: object, **_kwargs: object) -> nn.Module:
        return nn.Identity()

    for name in (
        "MergedColumnParallelLinear",
        "ColumnParallelLinear",
        "RowParallelLinear",
        "RMSNorm",
        "get_rope",
        "DeepseekV4MultiHeadLatentAttentionWrapper",
    ):
        assert hasattr(model, name), f"{model.__name__} no longer names {name}"
        monkeypatch.setattr(model, name, stand_in)
    monkeypatch.setattr(model, "get_tensor_model_parallel_world_size", lambda: 1)
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config), quant_config=None, cache_config=None
    )
    layer = model.DeepseekV4Attention(vllm_config, prefix="model.layers.0.attn")
    return layer.scale_fmt


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            _hf_config(quantization_config={"quant_method": "compressed-tensors"}), id="no-key"
        ),
        pytest.param(_hf_config(), id="no-attribute"),
        pytest.param(_hf_config(quantization_config=None), id="none"),
    ],
)
def test_absent_scale_fmt_means_ue8m0(
    monkeypatch: pytest.MonkeyPatch, config: SimpleNamespace
) -> None:
    assert _scale_fmt(monkeypatch, config) == "ue8m0"


@pytest.mark.parametrize("value", ["ue8m0", "float"])
def test_a_given_scale_fmt_is_kept(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    config = _hf_config(quantization_config={"scale_fmt": value})
    assert _scale_fmt(monkeypatch, config) == value
