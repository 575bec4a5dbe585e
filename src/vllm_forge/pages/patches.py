"""docs/generated/drift.md and seed-installer.md, from their records."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from packaging.version import Version
from rich.table import Table

from vllm_forge.pages.markdown import table, terminal_table
from vllm_forge.patches.drift import Answer
from vllm_forge.patches.seed_installer import MERGED, read_outcomes
from vllm_forge.project import Project

FITS = (Answer.APPLIES, Answer.OFFSET)


def best(change: dict[str, Any], release: str) -> dict[str, str]:
    """The verdict of the patch that fits a release best, with its line; of equals, the newest."""
    order = list(Answer)
    candidates = [
        verdict | {"line": patch["line"]}
        for patch in reversed(change["patches"])
        for verdict in patch["verdicts"]
        if verdict["release"] == release
    ]
    return min(candidates, key=lambda verdict: order.index(Answer(verdict["answer"])))


def first_change(patch: dict[str, Any]) -> dict[str, str] | None:
    """The first verdict after the patch's own release that is another one than there."""
    own = Version(patch["made for"])
    here = next((v for v in patch["verdicts"] if v["release"] == patch["made for"]), None)
    later = (v for v in patch["verdicts"] if Version(v["release"]) > own)
    return next((v for v in later if here is None or v["answer"] != here["answer"]), None)


def drift(data: dict[str, Any]) -> str:
    """The page of records/drift.json."""
    lines = [f"Written on {data['made']} by `{data['command']}`.\n", table(*_summary(data))]
    for change in data["changes"]:
        lines += ["", f"## {change['name']}", "", f"{change['summary']}. <{change['bug']}>", ""]
        rows, runs = [], []
        for patch in change["patches"]:
            changed = first_change(patch)
            what = f"{changed['release']}: {_text(changed)}" if changed else "none yet"
            rows.append([patch["line"], patch["patch"], patch["made for"], what])
            for text, verdicts in groupby(patch["verdicts"], key=_text):
                releases = [verdict["release"] for verdict in verdicts]
                span = dict.fromkeys((releases[0], releases[-1]))
                runs.append([patch["line"], " to ".join(span), text])
        head = ["line", "patch", "made for", "first release with another answer"]
        lines += [table(head, rows), "", table(["line", "releases", "answer"], runs)]
    return "\n".join(lines)


def drift_table(data: dict[str, Any]) -> Table:
    """The first table of the page, for a terminal."""
    return terminal_table(*_summary(data))


def _summary(data: dict[str, Any]) -> tuple[list[str], Iterator[list[str]]]:
    """Head and rows."""
    changes = data["changes"]

    def cell(change: dict[str, Any], release: str) -> str:
        verdict = best(change, release)
        several = len(change["patches"]) > 1 and verdict["answer"] in FITS
        return f"{verdict['answer']} ({verdict['line']})" if several else verdict["answer"]

    rows = (
        [row["version"], row["date"], *(cell(change, row["version"]) for change in changes)]
        for row in data["releases"]
    )
    return ["release", "of", *(change["name"] for change in changes)], rows


def _text(verdict: dict[str, str]) -> str:
    return f"{verdict['answer']} {verdict['detail']}".strip()


def seed_installer(project: Project) -> str:
    """What the edits of the first installer do to the releases of the lines."""
    outcomes = read_outcomes(project)
    needed = [row for row in outcomes if row.needed]
    rows = [[str(row.change), row.release, row.prints, row.places, row.verdict] for row in outcomes]
    head = ["change", "vLLM", "it prints", "lines changed", "outcome"]
    whole = sum(row.verdict == "lands" for row in needed)
    silent = sum(row.prints == MERGED for row in needed)
    return f"""{table(head, rows)}

* needed edits: {len(needed)} of {len(outcomes)};
* of those, applied in every place: {whole};
* reported as "{MERGED}" although the release has the fault: {silent}."""
