"""The machine we run on: commands, files, locks, disk, the console."""

from vllm_forge.host.console import console, progress, report
from vllm_forge.host.files import atomic_path, cache_root, exclusive, free_bytes, move, require_disk
from vllm_forge.host.run import RecordingRunner, Runner, SubprocessRunner, which

__all__ = [
    "RecordingRunner",
    "Runner",
    "SubprocessRunner",
    "atomic_path",
    "cache_root",
    "console",
    "exclusive",
    "free_bytes",
    "move",
    "progress",
    "report",
    "require_disk",
    "which",
]
