"""The questions of a line, and the config.json of each artifact that they are about.

Every preset is asked with each of its artifacts. A grid without presets has every SKU with every
artifact, also SKUs that the line does not serve, whose answers give the reason. It is asked again
with each retired variable set.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field

from vllm_forge.host import read_json
from vllm_forge.kernels.errors import ArtifactConfigError
from vllm_forge.kernels.selection.model import Device, Question
from vllm_forge.matrix import FrozenModel, Matrix, Sku, serve_arguments

# A node of eight GPUs: doctor checks whether a host has as many as a preset needs.
GPUS = 8
# Fits every SKU and divides every artifact: the grid is about kernels, not about memory.
GRID_ARGUMENTS = ("--tensor-parallel-size=4", "--kv-cache-dtype=fp8")
DRAFTER = '--speculative-config={"method":"mtp","num_speculative_tokens":1}'
ARTIFACTS = Path(__file__).with_name("artifacts")


class ArtifactFile(FrozenModel):
    """``config`` without the weights; ``base`` names a file whose config it adds to."""

    base: str | None = None
    sources: tuple[str, ...] = Field(min_length=1)
    unknown: tuple[str, ...] = ()
    config: dict[str, Any]


def preset_question(preset_name: str, artifact_name: str) -> str:
    """Name of the question that a preset asks for an artifact."""
    return f"preset/{preset_name}/{artifact_name}"


def grid_question(sku_name: str, artifact_name: str, variable: str = "") -> str:
    """Name of a question of the grid; ``variable``: a retired one that is set."""
    return "/".join(["grid", sku_name, artifact_name, *([variable] if variable else [])])


def line_questions(matrix: Matrix, line_name: str) -> tuple[Question, ...]:
    """All questions to a line with its series: its presets, then the grid."""
    questions: list[Question] = []
    for name, preset in matrix.preset.items():
        if preset.sku not in matrix.line[line_name].skus:
            continue
        arguments, environment = serve_arguments(matrix, name)
        sku = matrix.sku[preset.sku]
        questions += [
            Question(
                name=preset_question(name, artifact),
                device=declared_device(sku, count=GPUS),
                artifact=artifact,
                arguments=tuple(arguments),
                environment={**sku.env, **environment},
            )
            for artifact in preset.artifacts
        ]
    return (*questions, *grid_questions(matrix))


def grid_questions(matrix: Matrix) -> tuple[Question, ...]:
    """The questions without presets; those to a line's release as it was published."""
    return tuple(
        Question(
            name=grid_question(sku_name, artifact_name, variable),
            device=declared_device(sku, count=GPUS),
            artifact=artifact_name,
            arguments=(*GRID_ARGUMENTS, *([] if artifact.mtp == "none" else [DRAFTER])),
            environment={**sku.env, **({variable: "1"} if variable else {})},
        )
        for sku_name, sku in matrix.sku.items()
        for artifact_name, artifact in matrix.artifact.items()
        for variable in ("", *matrix.retired)
    )


def declared_device(sku: Sku, *, count: int) -> Device:
    """A number of GPUs of a SKU, as the stub driver declares them."""
    return Device(
        name=sku.device,
        compute_capability=sku.compute_capability,
        memory_bytes=sku.memory_gb * 10**9,
        count=count,
    )


def artifact_config(name: str, folder: Path = ARTIFACTS) -> dict[str, Any]:
    """The config.json of an artifact of the matrix; ArtifactConfigError if missing or malformed."""
    file = read_json(
        folder / f"{name}.json",
        ArtifactFile.model_validate,
        ArtifactConfigError,
        what=f"config.json of artifact {name}",
        remedy="write the artifact's config.json and its sources",
    )
    base = {} if file.base is None else artifact_config(file.base, folder)
    return base | file.config


def config_hash(name: str, folder: Path = ARTIFACTS) -> str:
    text = json.dumps(artifact_config(name, folder), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
