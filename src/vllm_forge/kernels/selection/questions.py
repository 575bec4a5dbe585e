"""The questions of a line: each preset with each of its artifacts, and a grid without presets.

The grid has every SKU with every artifact, also SKUs that the line does not serve: their answers
say why. It asks once more with each retired variable set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.kernels.selection.model import Device, Question
from vllm_forge.matrix import serve_arguments

if TYPE_CHECKING:
    from vllm_forge.matrix import Artifact, Matrix, Sku

# A node of eight GPUs: whether a host has as many as a preset needs is the doctor's question.
GPUS = 8
# Fits every SKU and divides every artifact: the grid is about kernels, not about memory.
GRID_ARGUMENTS = ("--tensor-parallel-size=4", "--kv-cache-dtype=fp8")
DRAFTER = '--speculative-config={"method":"mtp","num_speculative_tokens":1}'


def preset_question(preset_name: str, artifact_name: str) -> str:
    """Name of the question that a preset asks for an artifact."""
    return f"preset/{preset_name}/{artifact_name}"


def grid_question(sku_name: str, artifact_name: str, variable: str = "") -> str:
    """Name of a question of the grid; ``variable``: a retired one that is set."""
    return "/".join(["grid", sku_name, artifact_name, *([variable] if variable else [])])


def line_questions(matrix: Matrix, line_name: str) -> tuple[Question, ...]:
    """All questions to a line with its series."""
    return (*_preset_questions(matrix, line_name), *_grid_questions(matrix))


def published_questions(matrix: Matrix) -> tuple[Question, ...]:
    """All questions to a line's release as it was published."""
    return _grid_questions(matrix)


def _preset_questions(matrix: Matrix, line_name: str) -> tuple[Question, ...]:
    questions = []
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
    return tuple(questions)


def _grid_questions(matrix: Matrix) -> tuple[Question, ...]:
    return tuple(
        Question(
            name=grid_question(sku_name, artifact_name, variable),
            device=declared_device(sku, count=GPUS),
            artifact=artifact_name,
            arguments=_grid_arguments(artifact),
            environment={**sku.env, **({variable: "1"} if variable else {})},
        )
        for sku_name, sku in matrix.sku.items()
        for artifact_name, artifact in matrix.artifact.items()
        for variable in ("", *matrix.retired)
    )


def _grid_arguments(artifact: Artifact) -> tuple[str, ...]:
    return (*GRID_ARGUMENTS, *([] if artifact.mtp == "none" else [DRAFTER]))


def declared_device(sku: Sku, *, count: int) -> Device:
    """A number of GPUs of a SKU, as the stub driver declares them."""
    return Device(
        name=sku.device,
        compute_capability=sku.compute_capability,
        memory_bytes=sku.memory_gb * 10**9,
        count=count,
    )
