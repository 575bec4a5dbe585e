"""One quantization: what is quantized, how, with which data and by whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from vllm_forge.checkpoints.checkpoint import Checkpoint
    from vllm_forge.checkpoints.quantize.calibration import Calibration
    from vllm_forge.checkpoints.quantize.recipe import NamedRecipe
    from vllm_forge.checkpoints.tensors import StoredTensor, TensorToWrite


class Engine(Protocol):
    """What quantizes; calibrate.LayerQuantizer, or a stand-in where there is no torch."""

    @property
    def versions(self) -> dict[str, str]:
        """What the result depends on beside the inputs."""
        ...

    @property
    def needs_data(self) -> bool:
        """Whether a scale is calibrated; without one, no forward pass is needed."""
        ...

    def recipe_yaml(self) -> str:
        """The recipe as llm-compressor writes it."""
        ...

    def quantization_config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """What config.json says of the quantization."""
        ...

    def embed(self, weight: StoredTensor, tokens: Sequence[Sequence[int]], path: Path) -> None:
        """Write the input of the first layer."""
        ...

    def layer(
        self,
        index: int,
        weights: Mapping[str, StoredTensor],
        tokens: Sequence[Sequence[int]],
        source: Path,
        target: Path,
    ) -> list[TensorToWrite]:
        """Quantize a layer: input states at ``source``, its output states to ``target``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """All inputs of a quantization."""

    source: Checkpoint
    recipe: NamedRecipe
    calibration: Calibration
    engine: Engine
