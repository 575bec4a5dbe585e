"""What a server says of itself when it starts: which kernels, which graphs, which draft.

Headlines were wrong for weeks because nobody knew which backend ran, or that graphs were off. So
a verdict carries what the log said, and tests compare it with what they asked for. The texts are
those of vLLM 0.22.1 to 0.33.0; a line that is not found is absent in the result, never guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# vllm/v1/engine/core.py: "Initializing a V1 LLM engine (v%s) with config: %s"
ENGINE = re.compile(
    r"Initializing a V1 LLM engine \(v(?P<version>[^)]+)\) with config: (?P<rest>.*)"
)
# fused_moe/oracle/*.py
MOE = re.compile(r"Using '?(?P<backend>\w+)'? (?P<format>\w+) MoE backend\b")
# model_executor/kernels/linear/__init__.py
LINEAR = re.compile(r"Selected (?P<kernel>\w+) for (?P<layer>[\w.]+)")
GEMM = re.compile(r"Using (?P<kernel>\w+) for (?P<layer>\w+ GEMM)")
# platforms/cuda.py: automatic, and as asked for
ATTENTION = re.compile(
    r"Using (?:AttentionBackendEnum\.)?(?P<backend>[A-Z][A-Z0-9_]+)(?: attention)? backend\b"
)
# models/deepseek_v4/attention.py
CACHE = re.compile(r"Using DeepSeek's (?P<format>\w+) KV cache format")
INDEXER = re.compile(r"Using (?P<format>\w+) indexer cache for Lightning Indexer")
# models/deepseek_v4/nvidia/mtp.py
DRAFT = re.compile(r"MTP draft model loaded: (?P<params>\d+) params")
SHARED = re.compile(r"Sharing target model (?P<what>embedding|lm_head) weights with the\s+draft")
# v1/worker/gpu_model_runner.py, v1/worker/gpu/model_runner.py
CAPTURED = re.compile(r"Graph capturing finished in \d+ secs")
GRAPH_MODE = re.compile(r"'?cudagraph_mode'?[:=]\s*<?(?:CUDAGraphMode\.)?(?P<mode>[A-Z_]+)")
GRAPH_SIZES = re.compile(r"'?cudagraph_capture_sizes'?[:=]\s*\[(?P<sizes>[\d, ]*)\]")
SETTING = re.compile(
    r"\b(?P<name>dtype|max_seq_len|tensor_parallel_size|quantization|enforce_eager|"
    r"kv_cache_dtype|speculative_config|enable_prefix_caching)="
    r"(?P<value>SpeculativeConfig\([^)]*\)|[^,]+)"
)


@dataclass(frozen=True, kw_only=True)
class EffectiveConfig:
    """What ran, by the boot log; empty or None where the log does not say.

    Attributes:
        version: of vLLM, with our local part.
        settings: of the engine's configuration line, as printed.
        moe: ``<format>: <backend>`` of each MoE backend that was taken.
        linear: ``<layer>: <kernel>``.
        kv_cache: DeepSeek's KV cache format.
        graph_sizes: tokens per captured graph.
        draft_params: parameters that the MTP draft model loaded.
        shared: what the draft model takes from the target.
    """

    version: str | None
    settings: dict[str, str]
    moe: tuple[str, ...]
    linear: tuple[str, ...]
    attention: tuple[str, ...]
    kv_cache: str | None
    indexer: str | None
    graph_mode: str | None
    graph_sizes: tuple[int, ...]
    captured: bool
    draft_params: int | None
    shared: tuple[str, ...]


def parse(log: str) -> EffectiveConfig:
    """Read a boot log: stdout and stderr of the server, of all its processes."""
    # Workers prefix their lines, e.g. "(EngineCore pid=123) "; nothing here depends on it.
    engine = ENGINE.search(log)
    rest = engine["rest"] if engine else ""
    draft = DRAFT.search(log)
    cache, indexer = CACHE.search(log), INDEXER.search(log)
    mode, sizes = GRAPH_MODE.search(rest), GRAPH_SIZES.search(rest)
    return EffectiveConfig(
        version=engine["version"] if engine else None,
        settings={found["name"]: found["value"] for found in SETTING.finditer(rest)},
        moe=_unique(f"{found['format']}: {found['backend']}" for found in MOE.finditer(log)),
        linear=_unique(
            f"{found['layer']}: {found['kernel']}"
            for pattern in (LINEAR, GEMM)
            for found in pattern.finditer(log)
        ),
        attention=_unique(found["backend"] for found in ATTENTION.finditer(log)),
        kv_cache=cache["format"] if cache else None,
        indexer=indexer["format"] if indexer else None,
        graph_mode=mode["mode"] if mode else None,
        graph_sizes=tuple(
            int(size) for size in (sizes["sizes"] if sizes else "").split(",") if size.strip()
        ),
        captured=CAPTURED.search(log) is not None,
        draft_params=int(draft["params"]) if draft else None,
        shared=_unique(found["what"] for found in SHARED.finditer(log)),
    )


def _unique(values: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))
