"""The patch proof: series applied exactly or refused, and the wheel that comes of it."""

from vllm_forge.patches.apply import Applied, apply_series
from vllm_forge.patches.dispositions import (
    Decision,
    Disposition,
    decisions,
    read_dispositions,
)
from vllm_forge.patches.header import Patch, read_patch
from vllm_forge.patches.series import (
    TreeLock,
    check_line,
    fetch_base,
    read_series,
    read_tree_lock,
    update_line,
)
from vllm_forge.patches.wheel import ChangedFile, PatchedWheel, build_wheel

__all__ = [
    "Applied",
    "ChangedFile",
    "Decision",
    "Disposition",
    "Patch",
    "PatchedWheel",
    "TreeLock",
    "apply_series",
    "build_wheel",
    "check_line",
    "decisions",
    "fetch_base",
    "read_dispositions",
    "read_patch",
    "read_series",
    "read_tree_lock",
    "update_line",
]
