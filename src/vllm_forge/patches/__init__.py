"""The patch proof: series applied exactly or refused, and the wheel that comes of it."""

from vllm_forge.patches.apply import Applied, Patch, apply_series, read_patch
from vllm_forge.patches.dispositions import (
    Decision,
    decisions,
    known_issues,
    read_dispositions,
)
from vllm_forge.patches.series import (
    check_line,
    fetch_archive,
    read_series,
    read_tree_lock,
    update_line,
)
from vllm_forge.patches.wheel import PatchedWheel, build_wheel, kept_wheel
