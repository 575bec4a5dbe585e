"""Serving: presets to one command line, and their lint."""

from vllm_forge.serve.build_record import (
    BuiltImage,
    build_command,
    built_image,
    record_path,
)
from vllm_forge.serve.command import (
    ENGINES,
    Command,
    Engine,
    bare_command,
    container_command,
)
from vllm_forge.serve.launch import become, require_gpus, running_engine
from vllm_forge.serve.presets import (
    Serving,
    find_artifact,
    find_preset,
    presets_of,
    serving,
)
from vllm_forge.serve.selection import Selections

__all__ = [
    "ENGINES",
    "BuiltImage",
    "Command",
    "Engine",
    "Selections",
    "Serving",
    "bare_command",
    "become",
    "build_command",
    "built_image",
    "container_command",
    "find_artifact",
    "find_preset",
    "presets_of",
    "record_path",
    "require_gpus",
    "running_engine",
    "serving",
]
