"""Blocks of checks, verdicts, drift and of the first installer, made of records/."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from packaging.version import Version
from rich.table import Table

from vllm_forge.checkpoints.inspect.findings import ALIASES, FAULTS, label
from vllm_forge.checkpoints.inspect.inspection import DATA, Outcome, Verdicts
from vllm_forge.pages.markdown import table, terminal_table
from vllm_forge.patches.drift import Answer
from vllm_forge.patches.seed_installer import MERGED, read_outcomes
from vllm_forge.project import Project

OUTCOMES = {
    Outcome.WITH_MTP: "with MTP",
    Outcome.WITH_DSPARK: "with DSpark",
    Outcome.WITHOUT: "without MTP",
    Outcome.NOT: "**no**",
    Outcome.UNKNOWN: "unknown",
}


def checks(_: Project) -> str:
    """The checks, sorted by name."""
    cells = []
    for row in sorted(FAULTS.values(), key=lambda row: row["check"]):
        check, effect = row["check"], row["effect"]
        on = [f"{key} {row[key]}" for key in ("since", "before") if key in row]
        on += [f"without {row['handled_by']}"] if "handled_by" in row else []
        on += ["the first forward pass"] if row.get("in_forward") else []
        cells.append(
            [
                f"`{check}`",
                ALIASES.get(check, ""),
                row["title"],
                f"{effect}, draft" if row.get("scope") == "draft" else effect,
                ", ".join(on),
                row.get("remedy", ""),
            ]
        )
    head = ["check", "number", "fault", "effect", "on", "remedy"]
    return table(head, cells)


def verdicts(project: Project) -> str:
    """Which line serves which tiny checkpoint, and why not."""
    record: Verdicts = project.read_json(str(DATA), Verdicts.model_validate)
    rows, reasons = [], []
    for name, variant in record.variants.items():
        outcomes = [OUTCOMES[variant.lines[line].outcome] for line in record.vllm]
        checks = [row.check if row.counts_on else f"({row.check})" for row in variant.findings]
        listed = ", ".join(dict.fromkeys(checks)) or "-"
        rows.append([name, *outcomes, listed, variant.error or "-"])

        reasons += ["", f"**{name}**: {variant.about}.", ""]
        reasons += [f"* {label(row.check)}, {row.effect}: {row.title}" for row in variant.findings]
        messages: dict[str, list[str]] = {}
        for line, row in variant.lines.items():
            for message in row.why:
                if message.startswith("vLLM"):
                    messages.setdefault(message.replace("`", "'"), []).append(line)
        reasons += [f"* on {', '.join(lines)}: `{text}`" for text, lines in messages.items()]
        if not variant.findings and not any(row.why for row in variant.lines.values()):
            reasons.append("* no findings")
    heads = [f"{name} (vLLM {version})" for name, version in record.vllm.items()]
    grid = table(["variant", *heads, "checks", "error"], rows)
    device = f"Device: {record.device}, declared; no GPU was involved.\n"
    return "\n".join([device, grid, "", "## Why", *reasons])


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
