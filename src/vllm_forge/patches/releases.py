"""Releases of vLLM on the index, as source trees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from packaging.utils import InvalidSdistFilename, parse_sdist_filename
from packaging.version import InvalidVersion, Version

from vllm_forge.errors import UsageError
from vllm_forge.host import cache_root
from vllm_forge.sources import Download, Index, IndexFile, SourceRepo, download_all
from vllm_forge.sources.errors import DistributionNotFoundError

if TYPE_CHECKING:
    from pathlib import Path

PROJECT = "vllm"


@dataclass(frozen=True, kw_only=True)
class Release:
    """A final release: version, day of its upload, hash and path of its source archive."""

    version: str
    date: str
    sha256: str
    archive: Path


def releases_between(index: Index, first: str, last: str | None) -> list[tuple[Release, IndexFile]]:
    """Final releases on the index that were not yanked, oldest first, both ends included.

    ``last`` is None for the newest on the index.

    Raises:
        UsageError: not versions, or in the wrong order.
        DistributionNotFoundError: the index offers no source archive of one of the two.
    """
    try:
        low = Version(first)
        high = None if last is None else Version(last)
    except InvalidVersion as error:
        raise UsageError(
            f"not a version: {error}", remedy="e.g. --from 0.22.1 --to 0.33.0"
        ) from None
    if high is not None and low > high:
        raise UsageError(f"{first} is newer than {last}", remedy="--from OLDER --to NEWER")
    found: dict[Version, tuple[Release, IndexFile]] = {}
    for file in index.files(PROJECT):
        try:
            _, version = parse_sdist_filename(file.filename)
        except InvalidSdistFilename:
            continue
        if file.yanked or version.is_prerelease or version < low or (high and version > high):
            continue
        if file.sha256 is None or file.size is None:
            raise DistributionNotFoundError(
                f"the index gives no sha256 or no size for {file.filename}",
                where=index.url,
                remedy="use an index with the JSON simple API (PEP 691, PEP 700)",
            )
        release = Release(
            version=str(version),
            date=file.uploaded or "unknown",
            sha256=file.sha256,
            archive=cache_root() / "sdists" / file.sha256 / file.filename,
        )
        found[version] = (release, file)
    for end in (low, high):
        if end is not None and end not in found:
            raise DistributionNotFoundError(
                f"the index offers no source archive of a final release {end}",
                where=index.url,
                remedy="choose a release that is there and was not yanked",
            )
    return [found[version] for version in sorted(found)]


def fetch_releases(index: Index, wanted: list[tuple[Release, IndexFile]], repo: SourceRepo) -> None:
    """Download the archives that are neither imported nor in the cache, side by side."""
    missing = [
        Download(url=file.url, sha256=release.sha256, size=file.size or 0, target=release.archive)
        for release, file in wanted
        if repo.tree(release.version) is None and not release.archive.exists()
    ]
    if missing:
        download_all(index.session, missing)
