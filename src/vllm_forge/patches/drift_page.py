"""docs/generated/drift.md, rendered from records/drift.json and nothing else."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from packaging.version import Version
from rich.table import Table

from vllm_forge.patches.drift import Answer

if TYPE_CHECKING:
    from collections.abc import Iterable

HEAD = """# Drift

What each vLLM release does to each patch. Generated on {made} by

    {command}

which also writes [drift.json](drift.json); do not edit.

* **applies**: exactly, as a build demands it;
* **offset**: at other lines; for that release the patch has to be exported again;
* **upstream**: the release has the change, in the same words or, by the patch's header, in others
  (then the patch no longer fits);
* **conflict**: the code is still in that file, near the line named, but reads differently;
* **moved**: the code is in another file, near the line named;
* **gone**: the code is not there any more, nor elsewhere.

Where several lines carry a change, each for its own release, the table has the answer of the
patch that fits best, and the line it is from.
"""
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


def render(data: dict[str, Any]) -> str:
    """docs/generated/drift.md, from nothing but records/drift.json."""
    changes = data["changes"]
    lines = [HEAD.format(made=data["made"], command=data["command"])]
    lines += _table(["release", "of", *(change["name"] for change in changes)], _cells(data))
    for change in changes:
        lines += ["", f"## {change['name']}", "", f"{change['summary']}. <{change['bug']}>", ""]
        rows = []
        for patch in change["patches"]:
            changed = first_change(patch)
            what = f"{changed['release']}: {_text(changed)}" if changed else "none yet"
            rows.append([patch["line"], patch["patch"], patch["made for"], what])
        head = ["line", "patch", "made for", "first release with another answer"]
        lines += [*_table(head, rows), ""]
        runs = [
            [patch["line"], _span(list(run)), _text(verdict)]
            for patch in change["patches"]
            for verdict, run in _runs(patch["verdicts"])
        ]
        lines += _table(["line", "releases", "answer"], runs)
    return "\n".join(lines) + "\n"


def summary(data: dict[str, Any]) -> Table:
    """The first table of the page, for a terminal."""
    table = Table()
    for name in ("release", "of", *(change["name"] for change in data["changes"])):
        table.add_column(name, overflow="fold")
    for row in _cells(data):
        table.add_row(*row)
    return table


def _cells(data: dict[str, Any]) -> Iterable[list[str]]:
    for release in data["releases"]:
        row = [release["version"], release["date"]]
        for change in data["changes"]:
            verdict = best(change, release["version"])
            several = len(change["patches"]) > 1 and verdict["answer"] in FITS
            row.append(f"{verdict['answer']} ({verdict['line']})" if several else verdict["answer"])
        yield row


def _runs(verdicts: list[dict[str, str]]) -> Iterable[tuple[dict[str, str], list[str]]]:
    for _, run in groupby(verdicts, key=lambda verdict: (verdict["answer"], verdict["detail"])):
        same = list(run)
        yield same[0], [verdict["release"] for verdict in same]


def _span(releases: list[str]) -> str:
    return releases[0] if len(releases) == 1 else f"{releases[0]} to {releases[-1]}"


def _text(verdict: dict[str, str]) -> str:
    return f"{verdict['answer']} {verdict['detail']}".strip()


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
