"""The machine we run on: commands, files, locks, disk, the console."""

from vllm_forge.errors import suggestion
from vllm_forge.host.console import PlainConsole, console, gigabytes, printable, report, show
from vllm_forge.host.files import (
    READ_ONLY,
    atomic_path,
    cache_root,
    canonical,
    exclusive,
    hash_of,
    link_or_copy,
    open_plain,
    parse_json,
    read_data,
    read_plain,
    remove,
    require_disk,
    require_writable,
    tree_bytes,
    write_json,
    write_whole,
)
from vllm_forge.host.probe import HostProbe, Probe, RecordedProbe, RecordingProbe, Reply
from vllm_forge.host.run import (
    RecordingRunner,
    Runner,
    git,
    gpu_container,
    head_commit,
    which,
    worker_pool,
)
