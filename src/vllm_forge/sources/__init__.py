"""From a line's row to pinned bytes on disk: locks, wheels, source trees."""

from vllm_forge.sources.fetch import Download, Wheelhouse, download_all, verified
from vllm_forge.sources.index import Index
from vllm_forge.sources.lock import Lock, LockedWheel, make_lock, read_lock, read_wheels
from vllm_forge.sources.sdist import SourceRepo
