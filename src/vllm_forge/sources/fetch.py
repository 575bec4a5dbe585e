"""Downloads: side by side, with progress, resumable, never trusted without their hash; the cache.

A download ends one byte after the size that its lock says, and at a time: neither an endless file
nor one that drips can fill the disk or hold a build.
"""

import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import requests
from urllib3.exceptions import HTTPError

from vllm_forge.errors import ForgeError
from vllm_forge.host import cache_root, console, exclusive, gigabytes, remove
from vllm_forge.host.console import transfer_progress
from vllm_forge.host.errors import CacheError, DiskSpaceError
from vllm_forge.host.files import file_digest, inode, remove_foreign
from vllm_forge.sources import errors
from vllm_forge.sources.index import CONNECTIONS, TIMEOUT_S, Index, blocks
from vllm_forge.sources.lock import LockedWheel
from vllm_forge.sources.shared import give, shared_folder, take

PARALLEL = 8
TRIES = 5
PATIENCE_S = 300  # for one file; and
SLOWEST = 50_000  # bytes a second that it must come with
HTTP_PARTIAL = 206
HTTP_RANGE_NOT_SATISFIABLE = 416
GONE = (404, 410)


@dataclass(frozen=True, kw_only=True)
class Download:
    """One file to fetch. ``size`` in bytes; ``sha256`` in hex; ``target`` its final path.

    Unless its size is ``exact``, it may be smaller, and is not resumed.
    ``mirrors``: further URLs, each asked where those before it have no such file.
    ``shared``: taken from the folder that hosts share, and put there (``shared``).
    """

    url: str
    sha256: str
    size: int
    target: Path
    mirrors: tuple[str, ...] = ()
    exact: bool = True
    shared: bool = True

    @property
    def part(self) -> Path:
        return self.target.with_name(self.target.name + ".part")

    @property
    def kept(self) -> int:
        """Bytes of an earlier run; a file that is too long is thrown away."""
        have = self.part.stat().st_size if self.part.exists() else 0
        return have if self.exact and have <= self.size else 0

    def is_done(self) -> bool:
        """Whether the target is there, with its hash; a damaged one is deleted."""
        try:
            verified(self.target, self.sha256)
        except (CacheError, errors.HashMismatchError):
            return False
        return True


def download_all(session: requests.Session, downloads: Sequence[Download]) -> dict[Path, list[int]]:
    """Fetch what is not there, largest first; each appears only when its hash is right.

    Returns the ``inode`` of each that was fetched and hashed, by its target.

    What arrived of an unfinished file stays beside its target as ``.part`` and is resumed
    by the next call. An error of ``sources.errors`` says what keeps a file from coming, or
    DiskSpaceError from being written.
    """
    if not (downloads := [item for item in downloads if not item.is_done()]):
        return {}
    missing = sum(item.size - item.kept for item in downloads if item.exact)
    with transfer_progress(f"download {len(downloads)} files", missing) as advance:
        fetcher = _Fetcher(session, advance)
        items = sorted(downloads, key=lambda d: d.size, reverse=True)
        with ThreadPoolExecutor(PARALLEL) as pool:
            jobs = [pool.submit(fetcher.fetch, item) for item in items]
            try:
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            except BaseException:  # Ctrl-C: the pool would wait for the last file
                fetcher.stop.set()
                raise
            if any(job.exception() for job in done):
                fetcher.stop.set()
        gone = [item for item, job in zip(items, jobs, strict=True) if not job.result()]
        if gone:
            what = f"listed, but no host has it any more: {', '.join(i.target.name for i in gone)}"
            remedy = "use another index: this one's list is older than its files"
            raise errors.DistributionNotFoundError(what, where=gone[0].url, remedy=remedy)
    return fetcher.hashed


class _Fetcher:
    """Fetches single files; ``stop`` ends all of them, what they have is kept."""

    def __init__(self, session: requests.Session, tick: Callable[[int], None]) -> None:
        self.stop = threading.Event()
        self.hashed: dict[Path, list[int]] = {}
        self._session = session
        self._tick = tick

    def fetch(self, item: Download) -> bool:
        """Try until the file is complete, at most TRIES times; then check and rename it.

        False: no URL has it.
        """
        item.target.parent.mkdir(parents=True, exist_ok=True)
        remove_foreign(item.part)
        if item.shared and take(item.sha256, item.size, item.target):
            self._tick(item.size - item.kept if item.exact else 0)
            item.part.unlink(missing_ok=True)
            return True
        deadline = time.monotonic() + PATIENCE_S + item.size / SLOWEST
        last: Exception | None = None
        resumed = item.kept > 0
        for _ in range(TRIES):
            try:
                if item.kept != item.size or not item.part.exists():
                    urls = (item.url, *item.mirrors)
                    if not any(self._stream(url, item, deadline) for url in urls):
                        return False
            except (requests.RequestException, HTTPError, ValueError) as error:
                last = error
                continue
            except OSError as error:  # not the network's: urllib3 wraps those
                what = f"{item.part.name} cannot be written: {error}"
                remedy = "free some space, or set VLLM_FORGE_CACHE to another disk; finished "
                remedy += "files are kept"
                raise DiskSpaceError(what, where=item.part.parent, remedy=remedy) from error
            if self.stop.is_set():
                return True
            last = None
            if not item.exact or item.kept == item.size:
                try:
                    self._finish(item)
                except errors.HashMismatchError as error:
                    if not resumed:
                        raise
                    # What an earlier run left may be another answer, or cut by a crash.
                    resumed, last = False, error
                    self._tick(-item.size)
                    continue
                return True
        raise _unfinished(item, last)

    def _finish(self, item: Download) -> None:
        """Hash a part; rename it to its target."""
        before = inode(item.part.stat())
        if (digest := file_digest(item.part)) != item.sha256:
            item.part.unlink()
            what = f"{item.target.name}: sha256 is {digest}, the lock says {item.sha256}"
            remedy = "do not use this file. If the index is right and the lock is old, make a new "
            remedy += "lock; otherwise the mirror may be compromised"
            raise errors.HashMismatchError(what, where=item.url, remedy=remedy)
        remove(item.target)  # of another kind
        untouched = inode(item.part.stat()) == before
        item.part.rename(item.target)
        after = inode(item.target.stat())  # renaming changes its ctime, and nothing else
        if untouched and after[:-1] == before[:-1]:
            self.hashed[item.target] = after
        if item.shared:
            give(item.target, item.sha256, shared_folder())

    def _stream(self, url: str, item: Download, deadline: float) -> bool:
        """Append to the part what it lacks; False where the URL has no file."""
        have = item.kept
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with self._session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
            if answer.status_code in GONE:
                return False
            if answer.status_code == HTTP_RANGE_NOT_SATISFIABLE:
                item.part.unlink(missing_ok=True)
                self._tick(-have)  # comes again
                return True
            answer.raise_for_status()
            if have and answer.status_code != HTTP_PARTIAL:  # no ranges there: all comes again
                self._tick(-have)
                have = 0
            with item.part.open("ab" if have else "wb") as file:
                for block in blocks(answer, deadline):
                    if self.stop.is_set():
                        break
                    if have + len(block) > item.size:
                        item.part.unlink()
                        what = f"the server's file is longer than {item.size} bytes"
                        what = f"{item.target.name}: {what}"
                        remedy = "the mirror serves another file; use another index"
                        raise errors.TruncatedFileError(what, where=url, remedy=remedy)
                    file.write(block)
                    have += len(block)
                    self._tick(len(block))
        return True


def _unfinished(item: Download, last: Exception | None) -> ForgeError:
    """Why a file did not come; ``last``: of the last try, None where the server sent all it has."""
    have = item.part.stat().st_size if item.part.exists() else 0
    if last is None:
        what = f"{item.target.name}: the server's file ends at {have} of {item.size} bytes"
        remedy = "the mirror holds a damaged copy; use another index"
        return errors.TruncatedFileError(what, where=item.url, remedy=remedy)
    if have == 0:
        what = f"{item.target.name} cannot be fetched: {type(last).__name__}: {last}"
        remedy = "check the network and the proxy; finished files are kept"
        return errors.IndexUnreachableError(what, where=item.url, remedy=remedy)
    what = f"{item.target.name}: the connection broke {TRIES} times, {have} of {item.size} "
    what += f"bytes are kept ({type(last).__name__})"
    remedy = "run the same command again: it resumes where it stopped"
    return errors.DownloadInterruptedError(what, where=item.url, remedy=remedy)


def verified(path: Path, sha256: str) -> Path:
    """A file of the cache whose bytes were hashed just now.

    HashMismatchError, and it is deleted, if it is damaged; CacheError if it is missing.
    """
    try:
        digest = file_digest(path)
    except ValueError as error:
        digest = f"of nothing: {error}"
    except FileNotFoundError:
        what = f"{path.name} was deleted from the cache"
        remedy = "run the same command again, which downloads it"
        raise CacheError(what, where=path, remedy=remedy) from None
    if digest != sha256:
        remove(path)
        what = f"{path.name} in the cache has sha256 {digest}, the lock says {sha256}"
        remedy = "it was deleted; run the same command again, which downloads it"
        raise errors.HashMismatchError(what, where=path, remedy=remedy)
    return path


class Wheelhouse:
    """Downloaded wheels: folder ``wheels/<sha256>/<filename>`` of the cache."""

    def path(self, wheel: LockedWheel) -> Path:
        return cache_root() / "wheels" / wheel.sha256 / wheel.filename

    def missing(self, wheels: Sequence[LockedWheel]) -> list[LockedWheel]:
        """Those not here in full size."""
        paths = [(self.path(wheel), wheel) for wheel in wheels]
        return [w for path, w in paths if not path.exists() or path.stat().st_size != w.size]

    def fetch(
        self, wheels: Sequence[LockedWheel], index: Index | None = None
    ) -> dict[Path, list[int]]:
        """Download what is missing; asks no index when nothing is. Returns as ``download_all``."""
        if not self.missing(wheels):
            return {}
        source = index or Index()
        with exclusive("wheelhouse", wait=True):
            todo = [w for w in self.missing(wheels) if not take(w.sha256, w.size, self.path(w))]
            if not todo:
                return {}
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                files = list(pool.map(lambda wheel: source.find(wheel.name, wheel.filename), todo))
            downloads = [
                Download(url=file.url, sha256=w.sha256, size=w.size, target=self.path(w))
                for w, file in zip(todo, files, strict=True)
            ]
            hashed = download_all(source.session, downloads)
            size = gigabytes(sum(item.size for item in downloads))
            console.print(f"  [dim]{len(downloads)} wheels downloaded, {size}[/]")
            return hashed

    def unpack(self, wheels: Sequence[LockedWheel], folder: Path) -> None:
        """Unpack wheels into one folder; their programs can be run."""
        self.fetch(wheels)
        for wheel in wheels:
            with zipfile.ZipFile(self.verify(wheel)) as archive:
                for member in archive.infolist():
                    path = Path(archive.extract(member, folder))
                    if member.external_attr >> 16 & 0o111:  # extract() leaves modes out
                        path.chmod(0o755)

    def verify(self, wheel: LockedWheel, hashed: Mapping[Path, list[int]] | None = None) -> Path:
        """Path of a wheel whose bytes were hashed just now; see ``verified``.

        One that ``fetch`` returned in ``hashed`` was, unless it was touched since.
        """
        path = self.path(wheel)
        with suppress(OSError):
            if hashed and hashed.get(path) == inode(path.lstat()):
                return path
        return verified(path, wheel.sha256)
