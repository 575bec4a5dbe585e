"""Checkpoints that have the names, dtypes and shapes of an artifact, and ones for values.

No torch, and a second to write: for gates that look at headers. The artifacts that the field's
tools make are in the cache; records/verdicts.json says what the inspector makes of those.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.variants import DsparkSpec, apply_changes, load_variants
from vllm_forge.checkpoints.checkpoint import Checkpoint
from vllm_forge.checkpoints.fixtures.tiny import TinySpec
from vllm_forge.checkpoints.inspect.manifest import named
from vllm_forge.checkpoints.inspect.profile import Profile
from vllm_forge.checkpoints.tensors import in_memory, write_index, write_shard

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_forge.checkpoints.tensors import TensorSpec

# A one of each dtype; what matters is that scales are positive and can be halved.
ONES = {
    "F32": b"\x00\x00\x80\x3f", "BF16": b"\x80\x3f", "F8_E4M3": b"\x38", "F8_E8M0": b"\x7f",
    "U8": b"\x22", "I8": b"\x22", "I32": b"\x01\x00\x00\x00", "I64": b"\x01" + b"\x00" * 7,
}  # fmt: skip
SMALL = TinySpec(vocab=64, hidden=256, heads=2, q_rank=128, experts=8, expert_width=128)
DSPARK = DsparkSpec(**asdict(SMALL))
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
ATTENTION = {
    "targets": [r"re:.*\.attn\.(fused_wqa_wkv|wq_a|wkv|wq_b|wo_a|wo_b)$"],
    "weights": {**FP8, "strategy": "block", "block_structure": [128, 128], "dynamic": False},
    "input_activations": {**FP8, "strategy": "group", "group_size": 128, "dynamic": True},
    "format": "float-quantized",
}
EXPERTS = [r"re:.*\.ffn\.experts\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj)$"]
NVFP4 = {
    "targets": EXPERTS,
    "weights": {**FP4, "dynamic": False},
    "input_activations": {**FP4, "dynamic": "local"},
    "format": "nvfp4-pack-quantized",
}
W4A16 = {
    "targets": EXPERTS,
    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
    "input_activations": None,
    "format": "pack-quantized",
}
NATIVE = {
    "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}  # fmt: skip
MODELOPT = {**NATIVE, "moe_quant_algo": "NVFP4", "ignore": ["*.attn.*", "mtp.*"]}


def compressed(experts: Mapping[str, Any], layers: int = 3) -> dict[str, Any]:
    """A compressed-tensors config of the card's shape; ``layers`` is the draft layer's number."""
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "scale_fmt": "ue8m0",
        "config_groups": {"group_0": ATTENTION, "group_1": dict(experts)},
        "ignore": [
            "lm_head", r"re:.*\.attn\.compressor\..*", r"re:.*\.attn\.indexer\..*",
            r"re:.*\.ffn\.shared_experts\..*", rf"re:.*\.layers\.{layers}\..*",
        ],
    }  # fmt: skip


# Variant that the tools make -> manifest with its formats, quantization_config, sizes.
MADE: dict[str, tuple[str, dict[str, Any] | None, TinySpec]] = {
    "bf16": ("bf16", None, SMALL),
    "card": ("flash-nvfp4-fp8-mtp", compressed(NVFP4), SMALL),
    "w4a16-fp8-mtp": ("flash-w4a16-fp8-mtp", compressed(W4A16), SMALL),
    "native-fp8-mxfp4": ("deepseek-v4-flash", NATIVE, SMALL),
    "nvidia-modelopt": ("nvidia-nvfp4", MODELOPT, SMALL),
    "dspark": ("deepseek-v4-flash-0731", NATIVE, DSPARK),
}


def write_layout(folder: Path, artifact: str, config: dict[str, Any]) -> Path:
    """An artifact's tensors, all ones; two shards, an index, config.json."""
    wanted = list(named(artifact).wanted(config))
    folder.mkdir(parents=True)
    shards: dict[str, Sequence[TensorSpec]] = {}
    for number, rows in enumerate((wanted[::2], wanted[1::2]), 1):
        name = f"model-{number:05}-of-00002.safetensors"
        items = [in_memory(w.name, w.dtype, w.shape, _ones(w.dtype, w.shape)) for w in rows]
        write_shard(folder / name, items)
        shards[name] = rows
    write_index(folder, shards)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _ones(dtype: str, shape: tuple[int, ...]) -> bytes:
    count = 1
    for extent in shape:
        count *= extent
    return ONES[dtype] * count


def layout_config(variant: str) -> dict[str, Any]:
    """config.json of a variant that the tools make."""
    _, quantization, spec = MADE[variant]
    return spec.config() | ({"quantization_config": quantization} if quantization else {})


def layout(cache: Path, variant: str) -> Path:
    """A variant of variants.toml as a layout, made once per folder ``cache``."""
    folder = cache / variant
    if folder.exists():
        return folder
    if variant in MADE:
        return write_layout(folder, MADE[variant][0], layout_config(variant))
    row = load_variants()[variant]
    parent = layout(cache, row.parent)
    apply_changes(Checkpoint.open(parent), row.change, folder)
    return folder


def profile_of(folder: Path) -> Profile:
    """A folder, as it is now: pytest gives a path again to another test."""
    return Profile.open(folder)
