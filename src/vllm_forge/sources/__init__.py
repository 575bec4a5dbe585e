"""From a line's row to pinned bytes on disk: locks, wheels, source trees."""

from vllm_forge.sources.fetch import Download as Download
from vllm_forge.sources.fetch import Wheelhouse as Wheelhouse
from vllm_forge.sources.fetch import download_all as download_all
from vllm_forge.sources.fetch import verified as verified
from vllm_forge.sources.index import Index as Index
from vllm_forge.sources.index import IndexFile as IndexFile
from vllm_forge.sources.lock import UNPACK_RATIO as UNPACK_RATIO
from vllm_forge.sources.lock import Lock as Lock
from vllm_forge.sources.lock import LockedWheel as LockedWheel
from vllm_forge.sources.lock import make_lock as make_lock
from vllm_forge.sources.lock import read_lock as read_lock
from vllm_forge.sources.lock import read_wheels as read_wheels
from vllm_forge.sources.sdist import SourceRepo as SourceRepo
