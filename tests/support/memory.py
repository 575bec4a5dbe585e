"""Inspection of a checkpoint in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_forge.checkpoints.checkpoint import CheckpointSource
from vllm_forge.checkpoints.inspect.inspection import inspect
from vllm_forge.checkpoints.inspect.profile import Profile
from vllm_forge.patches import read_dispositions

if TYPE_CHECKING:
    from vllm_forge.checkpoints.inspect.inspection import Report

LINES = {"0.22": "0.22.1", "0.26": "0.26.0", "0.33": "0.33.0"}
DISPOSITIONS = read_dispositions(Path(__file__).parents[2] / "patches/vllm")


class Files(CheckpointSource):
    """Name -> content of its files."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.sizes = {name: len(data) for name, data in files.items()}

    def __str__(self) -> str:
        return "memory"

    def read(self, name: str, begin: int, end: int) -> bytearray:
        return bytearray(self.files[name][begin:end])


def inspect_files(files: dict[str, bytes]) -> Report:
    """By rules, without asking vLLM, on each line."""
    return inspect(Profile.open(Files(files)), LINES, DISPOSITIONS, {})
