"""The drift of all lines over a range of vLLM's releases: fetched, surveyed and recorded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.utils import InvalidSdistFilename, parse_sdist_filename
from packaging.version import InvalidVersion, Version
from rich.progress import track

from vllm_forge.errors import UsageError
from vllm_forge.host import atomic_path, cache_root, console, report
from vllm_forge.patches.drift import Release, Subject, Verdict, survey
from vllm_forge.patches.series import check_line, read_series
from vllm_forge.patches.variants import before
from vllm_forge.sources import Download, download_all
from vllm_forge.sources.errors import DistributionNotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.project import Project
    from vllm_forge.sources import Index, IndexFile, SourceRepo

DATA = Path("records/drift.json")
NUMBER = re.compile(r"^\d+-")


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
    for file in index.files("vllm"):
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


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """One release: what it is, its tree, and its verdicts in the order of all patches."""

    release: Release
    tree: str
    verdicts: tuple[Verdict, ...]


def survey_lines(
    project: Project, repo: SourceRepo, *, first: str, last: str | None
) -> list[Surveyed]:
    """Survey all patches of all lines in every final release of a range.

    Args:
        project: whose lines.
        repo: where the sources are imported to.
        first: oldest release.
        last: newest release, None for the newest on the index.
    """
    subjects, index = [], project.index
    for name, line in project.matrix.line.items():
        applied = check_line(project, name, repo)
        paths = tuple(patch.path for patch in read_series(project.root / line.series))
        befores = tuple(before(applied, number) for number in range(len(paths)))
        subjects.append(Subject(paths=paths, befores=befores))
    wanted = releases_between(index, first, last)
    with report(f"source archives of {len(wanted)} releases"):
        fetch_releases(index, wanted, repo)
    steps = survey(repo, [release for release, _ in wanted], subjects)
    quiet = not console.is_terminal
    return [
        Surveyed(release=release, tree=tree, verdicts=tuple(chain.from_iterable(verdicts)))
        for release, tree, verdicts in track(
            steps, "releases", total=len(wanted), console=console, disable=quiet
        )
    ]


def write_drift(project: Project, found: Sequence[Surveyed], day: str) -> dict[str, Any]:
    """Write what ``survey_lines`` returned to records/drift.json; return the data.

    ``day`` is today, YYYY-MM-DD.
    """
    first, last = found[0].release.version, found[-1].release.version
    data = {
        "made": day,
        "command": f"nox -s forge -- patch drift --from {first} --to {last}",
        "releases": [
            {"version": item.release.version, "date": item.release.date, "tree": item.tree}
            for item in found
        ],
        "changes": _changes(project, found),
    }
    with atomic_path(project.root / DATA) as aside:
        aside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return data


def _changes(project: Project, found: Sequence[Surveyed]) -> list[dict[str, Any]]:
    """Patches by what they are about: the same Bug in several lines is one change."""
    changes: dict[str, dict[str, Any]] = {}
    every = [
        (name, line.vllm, patch)
        for name, line in project.matrix.line.items()
        for patch in read_series(project.root / line.series)
    ]
    for number, (line_name, release, patch) in enumerate(every):
        verdicts = [
            {
                "release": item.release.version,
                "answer": item.verdicts[number].answer.value,
                "detail": item.verdicts[number].detail,
            }
            for item in found
        ]
        change = {
            "name": NUMBER.sub("", patch.name).removesuffix(".patch"),
            "bug": patch.fields["Bug"],
            "summary": patch.summary,
            "patches": [],
        }
        changes.setdefault(patch.fields["Bug"], change)["patches"].append(
            {"line": line_name, "patch": patch.name, "made for": release, "verdicts": verdicts}
        )
    return list(changes.values())
