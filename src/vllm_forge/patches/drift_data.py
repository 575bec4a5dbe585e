"""The drift of all lines over a range of releases: surveyed and recorded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track

from vllm_forge.host import atomic_path, console, report
from vllm_forge.patches.drift import Subject, Verdict, survey
from vllm_forge.patches.releases import Release, fetch_releases, releases_between
from vllm_forge.patches.series import check_line, read_series
from vllm_forge.patches.variants import before

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.project import Project
    from vllm_forge.sources import SourceRepo

DATA = Path("records/drift.json")
NUMBER = re.compile(r"^\d+-")


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
