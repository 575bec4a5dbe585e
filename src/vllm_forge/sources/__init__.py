"""From a line's row to pinned bytes on disk: locks, wheels, source trees."""

from vllm_forge.sources.fetch import Download, Wheelhouse, download_all, verified
from vllm_forge.sources.index import Index, IndexFile
from vllm_forge.sources.lock import (
    UNPACK_RATIO,
    Lock,
    LockedWheel,
    make_lock,
    read_lock,
    read_wheels,
)
from vllm_forge.sources.sdist import SourceRepo, git_env

__all__ = [
    "UNPACK_RATIO",
    "Download",
    "Index",
    "IndexFile",
    "Lock",
    "LockedWheel",
    "SourceRepo",
    "Wheelhouse",
    "download_all",
    "git_env",
    "make_lock",
    "read_lock",
    "read_wheels",
    "verified",
]
