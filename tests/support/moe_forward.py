"""The model of known tokens read back from its files and computed in numpy, as vLLM's kernels do.

Sums in float64; rounded to BF16 wherever vLLM stores a tensor. Quantized weights are decoded by
vllm_forge.checkpoints.codecs, which is tested against compressed-tensors, not by the code that
wrote them.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tests.gpu.models import exact_moe as exact
from vllm_forge.checkpoints.codecs.nvfp4 import Nvfp4, unpack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

DTYPES = {"BF16": "<u2", "U8": "u1", "F8_E4M3": "u1", "F32": "<f4", "I32": "<i4", "I64": "<i8"}


def read_raw(folder: Path) -> dict[str, tuple[str, NDArray[np.generic]]]:
    """Dtype and array of every tensor; BF16 and FP8 as their bits."""
    data = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    found = {}
    for name, row in json.loads(data[8 : 8 + size]).items():
        start, end = (8 + size + at for at in row["data_offsets"])
        found[name] = (
            row["dtype"],
            np.frombuffer(data[start:end], DTYPES[row["dtype"]]).reshape(row["shape"]),
        )
    return found


def bf16(values: Array) -> Array:
    """Rounded to nearest even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits += np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))
    return (bits & np.uint64(0xFFFF0000)).astype(np.uint32).view(np.float32).astype(np.float64)


def norm(values: Array) -> Array:
    """RMS norm with weights of 1."""
    return bf16(values / np.sqrt(np.mean(values * values, axis=-1, keepdims=True) + 1e-5))


def keep(values: Array, _layer: int) -> Array:
    return values


@dataclass
class Model:
    """Decoded weights: by expert and layer those that are quantized, by name the others."""

    plain: dict[str, Array]
    experts: dict[tuple[int, int, str], Array]
    moe_output: Callable[[Array, int], Array] = field(default=keep)

    @classmethod
    def read(cls, folder: Path) -> Model:
        raw = read_raw(folder)
        plain = {
            name: (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
            for name, (dtype, array) in raw.items()
            if dtype == "BF16" and ".experts." not in name
        }
        experts = {}
        for layer in range(exact.LAYERS):
            for expert in range(exact.EXPERTS):
                for part in ("gate", "up", "down"):
                    prefix = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj."
                    experts[layer, expert, part] = _weight(
                        {
                            name.removeprefix(prefix): array
                            for name, (_, array) in raw.items()
                            if name.startswith(prefix)
                        }
                    )
        return cls(plain=plain, experts=experts)

    def copy(self) -> Model:
        return Model(plain=dict(self.plain), experts=dict(self.experts))

    def hidden(self, tokens: NDArray[np.int64]) -> Array:
        """The last hidden state, normed: [tokens, SIZE]."""
        state = self.plain["model.embed_tokens.weight"][tokens]
        for layer in range(exact.LAYERS):
            prefix = f"model.layers.{layer}."
            assert not self.plain[f"{prefix}self_attn.o_proj.weight"].any()
            assert not self.plain[f"{prefix}mlp.shared_experts.down_proj.weight"].any()
            state = bf16(state + self.moe_output(self._moe(layer, norm(state)), layer))
        return norm(state)

    def logits(self, tokens: NDArray[np.int64]) -> Array:
        return self.hidden(tokens) @ self.plain["lm_head.weight"].T

    def _moe(self, layer: int, x: Array) -> Array:
        gate = self.plain[f"model.layers.{layer}.mlp.gate.weight"]
        scores = 0.5 * np.tanh(0.5 * (x @ gate.T)) + 0.5  # csrc: sigmoid_accurate
        best = np.argsort(-scores, axis=1, kind="stable")[:, :2]
        weights = np.take_along_axis(scores, best, axis=1)
        weights /= weights.sum(axis=1, keepdims=True) + 1e-20
        parts = np.zeros((*best.shape, exact.SIZE))
        for expert in range(exact.EXPERTS):
            rows, places = np.nonzero(best == expert)
            if len(rows):
                w = {part: self.experts[layer, expert, part] for part in ("gate", "up", "down")}
                g, u = bf16(x[rows] @ w["gate"].T), bf16(x[rows] @ w["up"].T)
                with np.errstate(over="ignore"):
                    h = bf16(bf16(g / (1 + np.exp(-g))) * u)
                parts[rows, places] = bf16((h @ w["down"].T) * weights[rows, places][:, None])
        return bf16(parts.sum(axis=1))


def _weight(found: dict[str, NDArray[np.generic]]) -> Array:
    if "weight_global_scale" in found:
        return Nvfp4(
            packed=found["weight_packed"].astype(np.uint8),
            scales=found["weight_scale"].astype(np.uint8),
            global_scale=np.float32(found["weight_global_scale"].item()),
        ).values()
    rows, columns = found["weight_shape"].tolist()
    codes = unpack(np.ascontiguousarray(found["weight_packed"]).view(np.uint8)).astype(np.float64)
    scales = (found["weight_scale"].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    assert codes.shape == (rows, columns)
    return (codes - 8) * np.repeat(scales, columns // scales.shape[1], axis=1)
