"""The oracle: what a line's own selection code takes for a declared device."""

from vllm_forge.kernels.selection.artifacts import artifact_config, config_hash
from vllm_forge.kernels.selection.model import Answer, Device, Question
from vllm_forge.kernels.selection.mount import ARGV, read_answers, write_inputs
from vllm_forge.kernels.selection.questions import (
    declared_device,
    grid_question,
    line_questions,
    preset_question,
    published_questions,
)
from vllm_forge.kernels.selection.recorded import (
    Recorded,
    inputs_of,
    read_recorded,
    require_fresh,
    require_same,
    write_recorded,
)

__all__ = [
    "ARGV",
    "Answer",
    "Device",
    "Question",
    "Recorded",
    "artifact_config",
    "config_hash",
    "declared_device",
    "grid_question",
    "inputs_of",
    "line_questions",
    "preset_question",
    "published_questions",
    "read_answers",
    "read_recorded",
    "require_fresh",
    "require_same",
    "write_inputs",
    "write_recorded",
]
