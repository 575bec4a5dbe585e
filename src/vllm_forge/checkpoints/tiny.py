"""A tiny DeepSeek-V4 with an MTP block: BF16, upstream naming, seeded, made without torch.

Dimensions that kernels hard-code are the real ones: head_dim 512 with 64 of RoPE, index_head_dim
128 with 64 heads, index_topk 512, compress ratios 0, 4 and 128, hc_mult 4; what FP8 blocks and
DeepGEMM tiles cut is a multiple of 128. The rest is small: 50 MB.

Weights are drawn from SHAKE-128 of the seed and the tensor's name, so that they depend neither on
a library's generator nor on the order in which tensors are written.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.checkpoints.inventory import (
    DSPARK_BLOCKS,
    HEAVY,
    MODEL_TYPE,
    SLIDING,
    SPARSE,
    Expected,
    draft_tensors,
    layer_tensors,
    shared_tensors,
)
from vllm_forge.checkpoints.shards import CONFIG, in_memory, write_index, write_shard
from vllm_forge.checkpoints.tiny_tokenizer import write_tokenizer
from vllm_forge.host import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm_forge.checkpoints.shards import Item

# Goes into the cache's key: bump it when the same spec gives other bytes.
REVISION = 1


@dataclass(frozen=True, kw_only=True)
class TinySpec:
    """Sizes of a tiny model; the defaults are the one that tests and fixtures use."""

    seed: int = 42
    ratios: tuple[int, ...] = (SLIDING, SPARSE, HEAVY)
    hash_layers: int = 1
    vocab: int = 512
    hidden: int = 512
    heads: int = 8
    q_rank: int = 128
    output_groups: int = 2
    output_rank: int = 128
    experts: int = 8
    experts_per_token: int = 2
    expert_width: int = 256
    mtp_blocks: int = 1
    dspark: bool = False

    @property
    def key(self) -> str:
        """Name of this model in the cache."""
        text = json.dumps([REVISION, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def config(self) -> dict[str, Any]:
        """config.json, with the keys of deepseek-ai/DeepSeek-V4-Flash, or of its DSpark edition."""
        drafts = DSPARK_BLOCKS if self.dspark else self.mtp_blocks
        dspark = {
            "dspark_markov_rank": 64,
            "dspark_target_layer_ids": list(range(len(self.ratios))[-DSPARK_BLOCKS:]),
        }
        return (dspark if self.dspark else {}) | {
            "architectures": ["DeepseekV4ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "compress_ratios": [*self.ratios, *[SLIDING] * drafts],
            "compress_rope_theta": 160000,
            "eos_token_id": 1,
            "hc_eps": 1e-06,
            "hc_mult": 4,
            "hc_sinkhorn_iters": 20,
            "head_dim": 512,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "index_head_dim": 128,
            "index_n_heads": 64,
            "index_topk": 512,
            "initializer_range": 0.02,
            "max_position_embeddings": 65536,
            "model_type": MODEL_TYPE,
            "moe_intermediate_size": self.expert_width,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.experts_per_token,
            "num_hash_layers": self.hash_layers,
            "num_hidden_layers": len(self.ratios),
            "num_key_value_heads": 1,
            "num_nextn_predict_layers": self.mtp_blocks,
            "o_groups": self.output_groups,
            "o_lora_rank": self.output_rank,
            "q_lora_rank": self.q_rank,
            "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 16,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
            "rope_theta": 10000,
            "routed_scaling_factor": 1.5,
            "scoring_func": "sqrtsoftplus",
            "sliding_window": 128,
            "swiglu_limit": 10.0,
            "tie_word_embeddings": False,
            "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocab,
        }


def write_bf16(folder: Path, spec: TinySpec) -> None:
    """Write the BF16 model: one file per layer, index, config, tokenizer, chat template.

    Args:
        folder: appears when everything is in it.
        spec: the sizes and the seed; the same spec gives the same bytes.
    """
    config = spec.config()
    groups = [list(shared_tensors(config))]
    groups += [list(layer_tensors(config, index)) for index in range(len(spec.ratios))]
    groups += [list(draft_tensors(config))]
    groups = [group for group in groups if group]
    with atomic_path(folder) as aside:
        aside.mkdir()
        shards, total = {}, 0
        for number, group in enumerate(groups, 1):
            name = f"model-{number:05}-of-{len(groups):05}.safetensors"
            items = list(_items(spec, group))
            write_shard(aside / name, items)
            shards[name] = [item.name for item in items]
            total += sum(item.size for item in items)
        write_index(aside, shards, total)
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tokenizer(aside, spec.vocab)


def _items(spec: TinySpec, group: Sequence[Expected]) -> Iterator[Item]:
    for tensor in group:
        data = _values(spec, tensor)
        yield in_memory(tensor.name, tensor.dtype, tensor.shape, data)


def _values(spec: TinySpec, tensor: Expected) -> bytes:
    """Bytes of a tensor, by what it is."""
    count = math.prod(tensor.shape)
    stream = hashlib.shake_128(f"{spec.seed}:{tensor.name}".encode())
    leaf = tensor.name.rsplit(".", 1)[-1]
    match tensor.dtype:
        case "I64":
            return _expert_table(stream.digest(tensor.shape[0]), spec)
        case "F32":
            scale = {"attn_sink": 1.0, "bias": 0.01, "ape": 0.5}.get(leaf, 0.02)
            if leaf.endswith("_scale"):
                return _near_one(stream.digest(count), wide=True)
            # The low half is random as well: a downcast to BF16 must lose something.
            noise = stream.digest(4 * count)
            return _widen(_normal(noise[: 2 * count], scale), noise[2 * count :])
        case _ if len(tensor.shape) == 1:
            return _near_one(stream.digest(count), wide=False)
        case _:
            return _normal(stream.digest(2 * count), tensor.shape[-1] ** -0.5)


def _normal(noise: bytes, scale: float) -> bytes:
    """BF16 of about a normal distribution: two random bytes each, the high one through a table."""
    values = bytearray(noise)
    values[1::2] = values[1::2].translate(_high_bytes(scale))
    return bytes(values)


def _high_bytes(scale: float) -> bytes:
    """Table from a random byte to sign and upper exponent bits of a normal BF16 of that scale."""
    table: list[int] = []
    # High byte h (without sign) holds magnitudes from 2^(2h-127) to 2^(2h-125); the highest one
    # here reaches eight times the scale, and what is five bytes below is too rare for 128 slots.
    top = math.floor((math.log2(scale * 8) + 127) / 2)
    for high in range(top - 5, top):
        below = math.erf(2.0 ** (2 * high - 125) / scale / math.sqrt(2))
        table += [high] * (round(128 * below) - len(table))
    table += [top] * (128 - len(table))
    return bytes([*table, *(high | 0x80 for high in table)])


def _near_one(noise: bytes, *, wide: bool) -> bytes:
    """Values from 0.5 to 2 around one: BF16, or FP32 if ``wide``."""
    low = bytes(0x60 + (byte & 0x3F) for byte in noise)
    if not wide:
        return b"".join(bytes((byte, 0x3F)) for byte in low)
    return b"".join(bytes((byte ^ 0x5A, byte, byte, 0x3F)) for byte in low)


def _widen(halves: bytes, low: bytes) -> bytes:
    """BF16 values with 16 more bits of mantissa: FP32."""
    wide = bytearray(2 * len(halves))
    wide[0::4], wide[1::4] = low[0::2], low[1::2]
    wide[2::4], wide[3::4] = halves[0::2], halves[1::2]
    return bytes(wide)


def _expert_table(noise: bytes, spec: TinySpec) -> bytes:
    """Distinct experts per token id, as I64."""
    rows = bytearray()
    for first in noise:
        for choice in range(spec.experts_per_token):
            rows += ((first + choice) % spec.experts).to_bytes(8, "little")
    return bytes(rows)
