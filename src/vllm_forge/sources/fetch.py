"""Downloads: side by side, with progress, resumable, and never trusted without their hash."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import requests
from urllib3.exceptions import HTTPError

from vllm_forge.errors import ForgeError
from vllm_forge.host import transfer_progress
from vllm_forge.host.errors import DiskSpaceError
from vllm_forge.sources.errors import (
    DistributionNotFoundError,
    DownloadInterruptedError,
    HashMismatchError,
    IndexUnreachableError,
    TruncatedFileError,
)
from vllm_forge.sources.index import TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

CHUNK = 1 << 20
PARALLEL = 8
TRIES = 5
HTTP_PARTIAL = 206
HTTP_RANGE_NOT_SATISFIABLE = 416
GONE = (404, 410)


@dataclass(frozen=True, kw_only=True)
class Download:
    """One file to fetch. ``size`` in bytes; ``sha256`` in hex; ``target`` its final path."""

    url: str
    sha256: str
    size: int
    target: Path


def download_all(session: requests.Session, downloads: Sequence[Download]) -> None:
    """Fetch all, largest first; each appears under its name only when its hash is right.

    What arrived of an unfinished file stays beside its target as ``.part`` and is resumed
    by the next call.

    Raises:
        DownloadInterruptedError: the connection broke on every try.
        HashMismatchError: complete, but other bytes than the lock names.
        TruncatedFileError: the server's file has another size than the index says.
        IndexUnreachableError: the file's host does not answer.
        DistributionNotFoundError: the host does not have the file that the index lists.
        DiskSpaceError: the file cannot be written.
    """
    missing = sum(item.size - _kept(item) for item in downloads)
    with transfer_progress(f"download {len(downloads)} files", missing) as advance:
        fetcher = _Fetcher(session, advance)
        with ThreadPoolExecutor(PARALLEL) as pool:
            jobs = [
                pool.submit(fetcher.fetch, item)
                for item in sorted(downloads, key=lambda d: d.size, reverse=True)
            ]
            try:
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            except BaseException:  # Ctrl-C: the pool would wait for the last file
                fetcher.stop.set()
                raise
            if any(job.exception() for job in done):
                fetcher.stop.set()
        for job in jobs:
            job.result()


class _Fetcher:
    """Fetches single files; ``stop`` ends all of them, what they have is kept."""

    def __init__(self, session: requests.Session, tick: Callable[[int], None]) -> None:
        self.stop = threading.Event()
        self._session = session
        self._tick = tick

    def fetch(self, item: Download) -> None:
        """Try until the file is complete, at most TRIES times; then check and rename it."""
        item.target.parent.mkdir(parents=True, exist_ok=True)
        part = _part(item)
        last: Exception | None = None
        for _ in range(TRIES):
            have, digest = _have(part)
            try:
                if have != item.size or not part.exists():
                    have, digest = self._stream(item, part, have, digest)
            except (requests.RequestException, HTTPError) as error:
                last = error
                continue
            except OSError as error:  # not the network's: urllib3 wraps those
                raise DiskSpaceError(
                    f"{part.name} cannot be written: {error}",
                    where=str(part.parent),
                    remedy="free some space, or set VLLM_FORGE_CACHE to another disk; finished "
                    "files are kept",
                ) from error
            if self.stop.is_set():
                return
            last = None
            if have == item.size:
                if digest.hexdigest() != item.sha256:
                    part.unlink()
                    raise HashMismatchError(
                        f"{part.stem}: sha256 is {digest.hexdigest()}, the lock says {item.sha256}",
                        where=item.url,
                        remedy="do not use this file. If the index is right and the lock is old, "
                        "make a new lock; otherwise the mirror may be compromised",
                    )
                part.rename(item.target)
                return
        raise _gave_up(item, part, last)

    def _stream(
        self, item: Download, part: Path, have: int, digest: hashlib._Hash
    ) -> tuple[int, hashlib._Hash]:
        """Append to ``part`` from byte ``have`` on; return how much is there and its hash."""
        if have > item.size:
            part.unlink()
            have, digest = 0, hashlib.sha256()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with self._session.get(item.url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
            if answer.status_code == HTTP_RANGE_NOT_SATISFIABLE:
                part.unlink()
                self._tick(-have)  # comes again
                return 0, hashlib.sha256()
            if answer.status_code in GONE:
                raise DistributionNotFoundError(
                    f"the index lists {item.target.name}, its host answers {answer.status_code}",
                    where=item.url,
                    remedy="use another index: this one's list is older than its files",
                )
            answer.raise_for_status()
            if have and answer.status_code != HTTP_PARTIAL:  # no ranges there: all comes again
                self._tick(-have)
                have, digest = 0, hashlib.sha256()
            with part.open("ab" if have else "wb") as file:
                for block in answer.raw.stream(CHUNK, decode_content=False):
                    if self.stop.is_set():
                        break
                    file.write(block)
                    digest.update(block)
                    have += len(block)
                    self._tick(len(block))
        return have, digest


def _part(item: Download) -> Path:
    """Where an unfinished file is."""
    return item.target.with_name(item.target.name + ".part")


def _kept(item: Download) -> int:
    """Bytes of an earlier run; a file that is too long is thrown away."""
    part = _part(item)
    have = part.stat().st_size if part.exists() else 0
    return have if have <= item.size else 0


def _have(part: Path) -> tuple[int, hashlib._Hash]:
    """Bytes of an unfinished file and their hash."""
    if not part.exists():
        return 0, hashlib.sha256()
    with part.open("rb") as file:
        return part.stat().st_size, hashlib.file_digest(file, "sha256")


def _gave_up(item: Download, part: Path, last: Exception | None) -> ForgeError:
    """The error after the last try: short file, no host, or a connection that keeps breaking."""
    have = part.stat().st_size if part.exists() else 0
    if last is None:
        return TruncatedFileError(
            f"{item.target.name}: the server's file ends at {have} of {item.size} bytes",
            where=item.url,
            remedy="the mirror holds a damaged copy; use another index",
        )
    if have == 0:
        return IndexUnreachableError(
            f"{item.target.name} cannot be fetched: {type(last).__name__}: {last}",
            where=item.url,
            remedy="check the network and the proxy; finished files are kept",
        )
    return DownloadInterruptedError(
        f"{item.target.name}: the connection broke {TRIES} times, {have} of {item.size} bytes "
        f"are kept ({type(last).__name__})",
        where=item.url,
        remedy="run the same command again: it resumes where it stopped",
    )
