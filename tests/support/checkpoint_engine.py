"""Quantization without torch: a small model, and an engine that makes the right names of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.checkpoints.architecture import HEAVY, SLIDING
from vllm_forge.checkpoints.fixtures.tiny import TinySpec, write_bf16
from vllm_forge.checkpoints.inspect.profile import stored_as
from vllm_forge.checkpoints.quantize.inputs import Calibration, Recipe, load_recipe, open_model
from vllm_forge.checkpoints.quantize.quantizer import FORMATS, Hidden, Job
from vllm_forge.checkpoints.tensors import TensorToWrite, in_memory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_forge.checkpoints.quantize.calibrate import LayerQuantizer
    from vllm_forge.checkpoints.tensors import StoredTensor
else:
    LayerQuantizer = object  # it needs torch

SMALL = TinySpec(
    ratios=(SLIDING, HEAVY),
    vocab=272,
    hidden=128,
    heads=2,
    output_rank=64,
    experts=4,
    expert_width=32,
)
CALIBRATION = Calibration(source="test", tokens=((0, 5, 9), (0, 7)))
ONE = b"\0\0\x80\x3f"  # 1.0 in FP32


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


class FakeEngine(LayerQuantizer):
    """Chains hidden states as the real one does, so that a layer's bytes depend on all before."""

    needs_data = True
    versions: dict[str, str]

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.layers: list[int] = []
        self.versions = {"tools": "1"}

    def recipe_yaml(self) -> str:
        return "recipe\n"

    def quantization_config(self, ignore: Sequence[str]) -> dict[str, Any]:
        return {"quant_method": "compressed-tensors", "ignore": list(ignore)}

    def embed(self, weight: StoredTensor, states: Hidden) -> None:
        digest = hashlib.sha256(weight.read() + repr(states.tokens).encode()).digest()
        states.path.write_bytes(digest)

    def layer(
        self, index: int, weights: Mapping[str, StoredTensor], source: Hidden, target: Hidden
    ) -> list[TensorToWrite]:
        self.layers.append(index)
        state = source.path.read_bytes()
        target.path.write_bytes(hashlib.sha256(state + bytes([index])).digest())
        return [
            item for name, stored in weights.items() for item in self.items(name, stored, state)
        ]

    def items(self, name: str, stored: StoredTensor, state: bytes) -> list[TensorToWrite]:
        """The tensors of one weight, by the recipe's format."""
        group = self.recipe.group_of(name)
        if group is None:
            return []
        made = []
        for piece in stored_as(stored, FORMATS[group.format]):
            seed = hashlib.sha256(state + piece.name.encode()).digest()
            single = bytes([1 + seed[0] % 100]) * piece.size
            data = ONE * (piece.size // 4) if piece.dtype == "F32" else single
            made.append(in_memory(piece.name, piece.dtype, piece.shape, data))
        return made


def make_job(folder: Path, recipe: str = "nvfp4-fp8-mtp") -> Job:
    """A job on a small model, written to ``folder`` on first use."""
    if not folder.exists():
        write_bf16(folder, SMALL)
    named = load_recipe(recipe)
    engine = FakeEngine(named)
    return Job(source=open_model(folder), recipe=named, calibration=CALIBRATION, engine=engine)


def tree_of(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
