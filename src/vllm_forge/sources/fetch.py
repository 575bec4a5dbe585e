"""Downloads: side by side, with progress, resumable, and never trusted without their hash."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import requests
from urllib3.exceptions import HTTPError

from vllm_forge.errors import (
    DownloadInterruptedError,
    HashMismatchError,
    IndexUnreachableError,
    TruncatedFileError,
)
from vllm_forge.host import progress
from vllm_forge.sources.index import TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

CHUNK = 1 << 20
PARALLEL = 8
TRIES = 5
HTTP_PARTIAL = 206
HTTP_RANGE_NOT_SATISFIABLE = 416


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
    """
    stop = threading.Event()
    with progress() as bar:
        total = bar.add_task(f"{len(downloads)} files", total=sum(d.size for d in downloads))
        with ThreadPoolExecutor(PARALLEL) as pool:
            jobs = [
                pool.submit(_one, session, item, stop, lambda n: bar.advance(total, n))
                for item in sorted(downloads, key=lambda d: d.size, reverse=True)
            ]
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            if any(job.exception() for job in done):
                stop.set()
        for job in jobs:
            job.result()


def _one(
    session: requests.Session, item: Download, stop: threading.Event, tick: Callable[[int], None]
) -> None:
    if stop.is_set():
        return
    item.target.parent.mkdir(parents=True, exist_ok=True)
    part = item.target.with_name(item.target.name + ".part")
    last: Exception | None = None
    for _ in range(TRIES):
        digest = hashlib.sha256()
        have = _hash_existing(part, digest)
        if have > item.size:
            part.unlink()
            continue
        try:
            if have < item.size:
                have, digest = _stream(session, item, part, digest, have, stop, tick)
        except requests.ConnectionError as error:
            if have == 0 and not part.exists():
                raise IndexUnreachableError(
                    f"the file's host does not answer: {type(error).__name__}",
                    where=item.url,
                    remedy="check the network and the proxy; finished files are kept",
                ) from error
            last = error
            continue
        except (requests.RequestException, HTTPError, OSError) as error:
            last = error
            continue
        if stop.is_set():
            return
        if have < item.size:
            last = None
            continue
        if digest.hexdigest() != item.sha256:
            part.unlink()
            raise HashMismatchError(
                f"{item.target.name}: sha256 is {digest.hexdigest()}, the lock says {item.sha256}",
                where=item.url,
                remedy="do not use this file. If the index is right and the lock is old, make a "
                "new lock; otherwise somebody serves you other bytes",
            )
        part.rename(item.target)
        return
    have = part.stat().st_size if part.exists() else 0
    if last is None:
        raise TruncatedFileError(
            f"{item.target.name}: the server's file ends at {have} of {item.size} bytes",
            where=item.url,
            remedy="the mirror holds a damaged copy; use another index",
        )
    raise DownloadInterruptedError(
        f"{item.target.name}: the connection broke {TRIES} times, {have} of {item.size} bytes "
        f"are kept ({type(last).__name__})",
        where=item.url,
        remedy="run the same command again: it resumes where it stopped",
    ) from last


def _hash_existing(part: Path, digest: hashlib._Hash) -> int:
    if not part.exists():
        return 0
    with part.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return part.stat().st_size


def _stream(
    session: requests.Session,
    item: Download,
    part: Path,
    digest: hashlib._Hash,
    have: int,
    stop: threading.Event,
    tick: Callable[[int], None],
) -> tuple[int, hashlib._Hash]:
    """Append to ``part`` from byte ``have`` on; return how much is there and its hash."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with session.get(item.url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        if answer.status_code == HTTP_RANGE_NOT_SATISFIABLE:
            part.unlink()
            return 0, hashlib.sha256()
        answer.raise_for_status()
        if have and answer.status_code != HTTP_PARTIAL:  # no ranges there: all of it comes again
            have, digest = 0, hashlib.sha256()
        with part.open("ab" if have else "wb") as file:
            for block in answer.raw.stream(CHUNK, decode_content=False):
                if stop.is_set():
                    break
                file.write(block)
                digest.update(block)
                have += len(block)
                tick(len(block))
    return have, digest
