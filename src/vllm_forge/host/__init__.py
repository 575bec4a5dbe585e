"""The machine we run on: commands, files, locks, disk, the console."""

from vllm_forge.host.console import console, gigabytes, printable, report, transfer_progress
from vllm_forge.host.files import (
    READ_ONLY,
    atomic_path,
    cache_root,
    exclusive,
    free_bytes,
    link_or_copy,
    move,
    remove,
    require_disk,
    tree_bytes,
)
from vllm_forge.host.probe import (
    HostProbe,
    Probe,
    RecordedProbe,
    RecordingProbe,
    Reply,
)
from vllm_forge.host.run import (
    RecordingRunner,
    Runner,
    SubprocessRunner,
    end_with_parent,
    gpu_container,
    which,
)
from vllm_forge.host.suggest import suggestion

__all__ = [
    "READ_ONLY",
    "HostProbe",
    "Probe",
    "RecordedProbe",
    "RecordingProbe",
    "RecordingRunner",
    "Reply",
    "Runner",
    "SubprocessRunner",
    "atomic_path",
    "cache_root",
    "console",
    "end_with_parent",
    "exclusive",
    "free_bytes",
    "gigabytes",
    "gpu_container",
    "link_or_copy",
    "move",
    "printable",
    "remove",
    "report",
    "require_disk",
    "suggestion",
    "transfer_progress",
    "tree_bytes",
    "which",
]
