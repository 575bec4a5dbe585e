"""The patch proof: series applied exactly or refused, and the wheel that comes of it."""

from vllm_forge.patches.apply import Applied as Applied
from vllm_forge.patches.apply import Patch as Patch
from vllm_forge.patches.apply import apply_series as apply_series
from vllm_forge.patches.apply import read_patch as read_patch
from vllm_forge.patches.dispositions import Decision as Decision
from vllm_forge.patches.dispositions import decisions as decisions
from vllm_forge.patches.dispositions import read_dispositions as read_dispositions
from vllm_forge.patches.series import check_line as check_line
from vllm_forge.patches.series import read_series as read_series
from vllm_forge.patches.series import read_tree_lock as read_tree_lock
from vllm_forge.patches.series import update_line as update_line
from vllm_forge.patches.wheel import PatchedWheel as PatchedWheel
from vllm_forge.patches.wheel import build_wheel as build_wheel
