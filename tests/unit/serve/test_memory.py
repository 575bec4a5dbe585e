"""GPU memory of deployments, against published figures and reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from packaging.version import Version

from vllm_forge.errors import UsageError
from vllm_forge.host.files import GIB
from vllm_forge.kernels.selection.questions import KvCache
from vllm_forge.kernels.selection.record import Rows, read_selection
from vllm_forge.matrix import image_cell, load
from vllm_forge.matrix.flags import Parallel
from vllm_forge.serve.deployment import Deployment, find_deployment
from vllm_forge.serve.memory import (
    KvPool,
    Memory,
    kv_pool,
    memory_of,
    stored_sizes,
    weights_per_rank,
)

ROOT = Path(__file__).parents[3]
MATRIX = load(ROOT)
RECORD = read_selection(ROOT / "records", "0.26")
CARD = "flash-nvfp4-fp8-mtp"
# The layers of DeepSeek-V4-Flash without a draft layer, as vLLM 0.22.1 and 0.26.0 answer.
FLASH = tuple(
    KvCache(layers=layers, kind="", block_size=block, page_bytes=page, window=window)
    for layers, block, page, window in (
        (20, 256, 1728, None), (21, 256, 37440, None), (21, 256, 8640, None),
        (21, 4, 32832, 8), (21, 4, 8640, 8), (43, 64, 37440, 128), (20, 8, 32832, 128),
    )
)  # fmt: skip


def tp(size: int) -> Parallel:
    return Parallel(tensor=size)


@pytest.mark.parametrize(
    ("artifact", "total", "two", "four"),
    [
        (CARD, 181.3, 90.4, 46.0),
        ("flash-w4a16-fp8-mtp", 168.3, 83.9, 42.7),
        ("redhat-nvfp4-fp8", 164.2, 82.8, 42.0),
        ("nvidia-nvfp4", 168.3, 84.8, 43.1),
        ("deepseek-v4-flash-0731", 166.9, 84.2, 42.9),
    ],
)
def test_weights_of_a_rank(artifact: str, total: float, two: float, four: float) -> None:
    """GB, without the copies of embedding and head: 1.58 GB of the card's are on every rank."""
    sizes = stored_sizes(artifact)
    assert sizes is not None
    assert round(sum(sizes.values()) / 1e9, 1) == total
    for size, gigabytes in ((2, two), (4, four)):
        weights = weights_per_rank(artifact, tp(size), drafting=True)
        assert weights is not None
        assert round(weights / 1e9, 1) == gigabytes
    assert weights_per_rank("no-such-artifact", tp(2), drafting=True) is None


def test_experts_are_divided_over_all_ranks_of_data_parallelism() -> None:
    """With and without expert parallelism, alike; the rest is whole in each of them."""
    sizes = stored_sizes(CARD)
    assert sizes is not None
    experts = sum(size for (_, kind), size in sizes.items() if kind == "experts")
    whole = sum(sizes.values()) - sizes["mtp", "copies"]
    weights = weights_per_rank(CARD, Parallel(data=4), drafting=True)
    assert weights == pytest.approx(whole - experts + experts / 4, abs=8)


def test_pipeline_stages_have_their_layers_and_one_end() -> None:
    sizes = stored_sizes(CARD)
    assert sizes is not None
    ends = {part: size for (part, kind), size in sizes.items() if kind != "copies"}
    parts = {
        p: sum(s for (q, k), s in sizes.items() if (p, k != "copies") == (q, True)) for p in ends
    }
    last = sum(size for part, size in parts.items() if part not in {"layers", "embed"})
    assert last > parts["embed"]  # head and draft layer
    expected = parts["layers"] * 22 / 43 + last
    assert weights_per_rank(CARD, Parallel(pipeline=2), drafting=True) == pytest.approx(expected)


def test_v4_pro_fits_eight_gpus_alone() -> None:
    """913 GB, as published: too much for two GPUs of 288 GB."""
    name = "pro-nvfp4-fp8-mtp"
    sizes = stored_sizes(name)
    assert sizes is not None
    assert round(sum(sizes.values()) / 1e9) == MATRIX.artifact[name].size_gb == 913
    weights = weights_per_rank(name, tp(8), drafting=False)
    assert weights is not None
    assert round(weights / 1e9, 1) == 115.5
    assert memory("pro", sku="b300").verdict == "ok"
    assert memory("pro", "-tp", "2", sku="b300").verdict == "red"


def test_draft_layer_is_loaded_with_speculation_only() -> None:
    with_draft = weights_per_rank(CARD, tp(2), drafting=True)
    without = weights_per_rank(CARD, tp(2), drafting=False)
    assert with_draft is not None
    assert without is not None
    assert 6e9 < with_draft - without < 7e9


def pool(release: str, tokens: int) -> KvPool:
    return kv_pool(FLASH, Version(release), tp(2), tokens)


def test_report_of_too_little_kv_cache_on_two_gpus() -> None:
    """vLLM 0.22, 16384 batched tokens: 6.66 GiB for 30000 tokens, 13528 fit into 5.44 GiB.

    https://github.com/vllm-project/vllm/issues/44376, comment of 2026-06-03
    """
    kv = pool("0.22.1", 16384)
    assert round(kv.bytes_of(30000) / GIB, 2) == 6.66
    assert round(kv.bytes_of(13528) / GIB, 2) == 5.44
    assert kv.longest(kv.bytes_of(13528), 30000) == 13528
    assert kv.bytes_of(30000) > 5.44 * GIB


def test_report_of_too_little_kv_cache_on_four_gpus() -> None:
    """2048 batched tokens: 1.34 GiB for 131072 tokens, 720 fit into 0.3 GiB.

    https://github.com/yhfgyyf/vllm-deepseek-v4-sm89/issues/54
    """
    kv = pool("0.22.1", 2048)
    assert round(kv.bytes_of(131072) / GIB, 2) == 1.34
    assert kv.longest(round(0.296 * GIB), 131072) == 720


def test_requests_that_a_rehearsal_held() -> None:
    """Two H200, vLLM 0.26.0, twice 8192 tokens in flight: 44.46 GiB are 4,808,600 tokens.

    The log rounds to 10 MiB; one block more or less is 0.0001 of a request.
    """
    kv, length = pool("0.26.0", 2 * 8192), 1 << 20
    assert kv.stored_bytes == 20 * 1728 + 22 * 37440 + 21 * 8640
    assert kv.requests(round(44.46 * GIB), length) * length == pytest.approx(4_808_600, rel=2e-4)
    padded = replace(kv, stored_bytes=kv.block_bytes)
    assert padded.requests(round(44.46 * GIB), length) * length < 4_760_000


def test_requests_of_lines_that_count_otherwise() -> None:
    """0.22.1 stores the padding too; 0.33.0 counts a block of every group whole."""
    old, new = pool("0.22.1", 8192), pool("0.33.0", 2 * 8192)
    assert old.stored_bytes == old.block_bytes
    blocks = 4096 + 4099 + 2 * 259 + 2065
    assert new.requests(blocks * new.stored_bytes, 1 << 20) == 1


def test_blocks_of_each_line() -> None:
    """0.26.0 counts two steps in flight, 0.33.0 the bytes of the widest group."""
    assert pool("0.26.0", 4096).block_bytes == 22 * (1728 + 37440 + 8640)
    assert pool("0.33.0", 4096).block_bytes == 20 * 1728 + 21 * (37440 + 8640)
    words = ["--tensor-parallel-size=2", "--max-num-batched-tokens=2048"]
    answer = RECORD.answers[f"preset/rtxpro6000-tp2-mtp/{CARD}"]
    made = {
        (release, *flags): memory_of(
            artifact=CARD, words=[*words, *flags], release=release, total=1 << 37, answer=answer
        )
        for release in ("0.22.1", "0.26.0")
        for flags in ((), ("--no-async-scheduling",))
    }
    tokens = {key: m.pool.in_flight for key, m in made.items() if m is not None and m.pool}
    assert list(tokens.values()) == [2048, 2048, 4096, 2048]


def deployment(preset: str, *flags: str, sku: str = "rtxpro6000") -> Deployment:
    found = find_deployment(MATRIX, image_cell(MATRIX, sku, "0.26"), preset)
    return replace(found, flags=flags)


def memory_by(rows: Rows, asked: Deployment) -> Memory | None:
    return asked.memory(rows)


def memory(preset: str, *flags: str, sku: str = "rtxpro6000") -> Memory:
    found = memory_by(RECORD.rows, deployment(preset, *flags, sku=sku))
    assert found is not None
    return found


def test_published_start_on_two_gpus_is_not_red() -> None:
    """The model card's TP2 on RTX PRO 6000 starts, with little left: nobody can promise it."""
    found = memory("tp2-mtp")
    assert found.verdict == "unknown"
    assert 4 < found.left / GIB < 5
    assert "84.2 GiB for the weights, 2.2 GiB of KV cache for 131072 tokens" in found.needed
    assert f"(at most {found.longest} fit)" in found.needed


def test_low_utilization_is_red_with_a_remedy() -> None:
    """81.3 GiB of 95.6 do not hold 84.2: vLLM finds no memory for cache blocks."""
    found = memory("tp2-mtp", "--gpu-memory-utilization=0.85")
    assert found.verdict == "red"
    assert found.remedy.startswith("--gpu-memory-utilization of at least 0.92")
    assert memory("tp2-mtp", "--gpu-memory-utilization=0.92").verdict == "unknown"


def test_context_that_cannot_fit_is_red_with_the_longest() -> None:
    found = memory("tp2-mtp", "--max-model-len=1048576", "--gpu-memory-utilization=0.93")
    assert found.verdict == "red"
    assert found.longest is not None
    assert f"--max-model-len below {found.longest}" in found.remedy
    assert 131072 < found.longest < 1048576


@pytest.mark.parametrize("value", ["auto", "-1"])
def test_context_of_vllms_choice_is_what_fits(value: str) -> None:
    found = memory("tp2-mtp", f"--max-model-len={value}")
    assert (found.max_model_len, found.verdict) == (None, "unknown")
    assert f"as many tokens as fit (at most {found.longest})" in found.needed


@pytest.mark.parametrize(
    "flag",
    ["--cpu-offload-gb=20", "--cpu_offload_gb=20", "--kv-cache-memory-bytes=4000000000",
     "--num-gpu-blocks-override=100", "--offload-backend=prefetch", "--enable-eplb"],
)  # fmt: skip
def test_memory_that_flags_move_is_not_judged(flag: str) -> None:
    """Weights on the host, or a KV cache of a size of its own: no red for what may start."""
    found = deployment("tp2-mtp", flag, "--gpu-memory-utilization=0.5")
    assert found.memory(RECORD.rows) is None


def test_every_preset_has_a_figure() -> None:
    """No unknown where a manifest exists, and no preset that cannot start."""
    for name, preset in MATRIX.preset.items():
        cell = image_cell(MATRIX, preset.sku, "0.26")
        for artifact in preset.artifacts:
            found = memory_by(RECORD.rows, find_deployment(MATRIX, cell, name, artifact))
            if stored_sizes(artifact) is None:
                continue
            assert found is not None
            assert found.kv_cache is not None, (name, artifact)
            assert found.verdict != "red", (name, artifact, found.needed)


def test_kv_cache_of_another_type_is_unknown() -> None:
    """The recorded ones are of fp8, and vLLM was not asked about another one."""
    assert memory("tp2-mtp").kv_cache == memory("tp2-mtp", "--kv-cache-dtype=fp8").kv_cache
    for flag in ("--kv-cache-dtype=auto", "--block-size=64"):
        found = memory("tp2-mtp", flag)
        assert (found.kv_cache, found.verdict) == (None, "unknown")


@pytest.mark.parametrize(("text", "tokens"), [("128k", 128000), ("128K", 131072), ("1m", 10**6)])
def test_length_with_a_unit(text: str, tokens: int) -> None:
    assert memory("tp4-mtp", f"--max-model-len={text}").max_model_len == tokens


def test_preset_that_was_never_asked_is_judged_by_its_weights() -> None:
    found = deployment("tp2-mtp", "--gpu-memory-utilization=0.85").memory(())
    assert found is not None
    assert (found.verdict, found.kv_cache, found.longest) == ("red", None, None)


@pytest.mark.parametrize("value", ["0", "1.1", "half", "nan"])
def test_invalid_utilization_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="above 0, at most 1"):
        memory("tp2-mtp", f"--gpu-memory-utilization={value}")
