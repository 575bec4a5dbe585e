"""What a boot log says of the kernels that ran."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gpu.harness.bootlog import parse

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def log(root: Path) -> str:
    return (root / "tests/fixtures/bootlogs/dsv4-mtp.txt").read_text()


def test_a_real_log_of_the_tiny_deepseek_v4(root: Path) -> None:
    """vLLM 0.26.0 with the series on an H200, eager."""
    config = parse((root / "tests/fixtures/bootlogs/dsv4-mtp-h200.txt").read_text())
    assert config.version == "0.26.0+forge.7c43ca5ad935"
    assert config.moe == ("NvFp4: MARLIN", "Unquantized: TRITON")
    (linear,) = config.linear
    assert linear == "CompressedTensorsW8A8Fp8: FlashInferFp8DeepGEMMDynamicBlockScaledKernel"
    assert (config.kv_cache, config.indexer) == ("fp8_ds_mla", "FP8")
    assert (config.graph_mode, config.graph_sizes, config.captured) == ("NONE", (), False)
    assert (config.draft_params, config.shared) == (31, ("embedding", "lm_head"))
    assert "num_spec_tokens=1" in config.settings["speculative_config"]


def test_a_real_log_of_a_server_with_graphs(root: Path) -> None:
    """GLM-4-MoE with NVFP4 experts, as the race suite serves it: other attention, and graphs."""
    config = parse((root / "tests/fixtures/bootlogs/glm4-moe-graphs-h200.txt").read_text())
    assert config.moe == ("NvFp4: MARLIN", "Unquantized: TRITON")
    assert config.attention == ("TRITON_ATTN",)
    assert config.captured
    assert (config.graph_mode, config.graph_sizes[-1]) == ("FULL_AND_PIECEWISE", 64)
    assert (config.kv_cache, config.draft_params) == (None, None)


def test_all_of_it(log: str) -> None:
    config = parse(log)
    assert config.version == "0.26.0+forge.7c43ca5ad935"
    assert config.moe == ("NvFp4: MARLIN", "Unquantized: TRITON")
    assert config.attention == ("FLASHMLA_SPARSE",)
    assert config.linear == ("CompressedTensorsW8A8Fp8: DeepGemmFp8BlockScaledMMKernel",)
    assert (config.kv_cache, config.indexer) == ("fp8_ds_mla", "FP8")
    assert (config.graph_mode, config.graph_sizes) == ("FULL_AND_PIECEWISE", (3, 6, 12, 24))
    assert config.captured
    assert config.draft_params == 131
    assert config.shared == ("embedding",)
    assert config.settings["tensor_parallel_size"] == "4"
    assert config.settings["enforce_eager"] == "False"
    assert "num_spec_tokens=2" in config.settings["speculative_config"]


@pytest.mark.parametrize(
    ("gone", "field", "value"),
    [
        ("Initializing a V1", "version", None),
        ("NvFp4 MoE", "moe", ("Unquantized: TRITON",)),
        ("Graph capturing", "captured", False),
        ("draft model loaded", "draft_params", None),
        ("attention backend", "attention", ()),
    ],
)
def test_what_is_not_said_is_absent(log: str, gone: str, field: str, value: object) -> None:
    rows = [row for row in log.splitlines() if gone not in row]
    assert getattr(parse("\n".join(rows)), field) == value


def test_graphs_that_are_off() -> None:
    config = parse(
        "Initializing a V1 LLM engine (v0.26.0) with config: enforce_eager=True, "
        "compilation_config={'cudagraph_mode': <CUDAGraphMode.NONE: 0>, "
        "'cudagraph_capture_sizes': []}"
    )
    assert (config.graph_mode, config.graph_sizes, config.captured) == ("NONE", (), False)


def test_an_empty_log_says_nothing() -> None:
    config = parse("")
    assert config.version is None
    assert config.moe == ()
