"""Blocks made of records/ and of benchmarks/results."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from packaging.version import Version

from vllm_forge.checkpoints.inspect.findings import ALIASES, FAULTS, label
from vllm_forge.checkpoints.inspect.inspection import Outcome
from vllm_forge.pages.markdown import table
from vllm_forge.patches.drift import Answer
from vllm_forge.project import Project

MB = 1_000_000
SHOWN = 12
MERGED = "already applied or merged"  # as the first installer prints it
OUTCOMES = {
    Outcome.WITH_MTP: "with MTP",
    Outcome.WITH_DSPARK: "with DSpark",
    Outcome.WITHOUT: "without MTP",
    Outcome.NOT: "**no**",
    Outcome.UNKNOWN: "unknown",
}


def checks(_: Project) -> str:
    cells = []
    for row in sorted(FAULTS.values(), key=lambda row: row["check"]):
        on = [f"{key} {row[key]}" for key in ("since", "before") if key in row]
        on += [f"without {row['handled_by']}"] if "handled_by" in row else []
        on += ["the first forward pass"] if row.get("in_forward") else []
        named = [f"`{row['check']}`", ALIASES.get(row["check"], ""), row["title"]]
        effect = row["effect"] + (", draft" if row.get("scope") == "draft" else "")
        cells.append([*named, effect, ", ".join(on), row.get("remedy", "")])
    head = ["check", "number", "fault", "effect", "on", "remedy"]
    return table(head, cells)


def verdicts(record: dict[str, Any]) -> str:
    """Which line serves which tiny checkpoint, and why not."""
    rows, reasons = [], []
    for name, variant in record["variants"].items():
        lines, findings = variant["lines"], variant["findings"]
        outcomes = [OUTCOMES[lines[line]["outcome"]] for line in record["vllm"]]
        checks = [row["check"] if row["counts_on"] else f"({row['check']})" for row in findings]
        listed = ", ".join(dict.fromkeys(checks)) or "-"
        rows.append([name, *outcomes, listed, variant["error"] or "-"])

        reasons += ["", f"**{name}**: {variant['about']}.", ""]
        reasons += [f"* {label(row['check'])}, {row['effect']}: {row['title']}" for row in findings]
        messages: dict[str, list[str]] = {}
        for line, row in lines.items():
            for message in row["why"]:
                if message.startswith("vLLM"):
                    messages.setdefault(message.replace("`", "'"), []).append(line)
        reasons += [f"* on {', '.join(names)}: `{text}`" for text, names in messages.items()]
        if not findings and not any(row["why"] for row in lines.values()):
            reasons.append("* no findings")
    heads = [f"{name} (vLLM {version})" for name, version in record["vllm"].items()]
    grid = table(["variant", *heads, "checks", "error"], rows)
    device = f"Device: {record['device']}, declared; no GPU was involved.\n"
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
    lines = [f"Written on {data['made']} by `{data['command']}`.\n", table(*drift_summary(data))]
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


def drift_summary(data: dict[str, Any]) -> tuple[list[str], Iterator[list[str]]]:
    """Releases by changes."""
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


def seed_installer(outcomes: list[dict[str, Any]]) -> str:
    """What the edits of the first installer do to the releases of the lines."""
    needed = [row for row in outcomes if row["needed"]]
    keys = ("release", "prints", "places", "verdict")
    rows = [[str(row["change"]), *(row[key] for key in keys)] for row in outcomes]
    head = ["change", "vLLM", "it prints", "lines changed", "outcome"]
    whole = sum(row["verdict"] == "lands" for row in needed)
    silent = sum(row["prints"] == MERGED for row in needed)
    return f"""{table(head, rows)}

* needed edits: {len(needed)} of {len(outcomes)};
* of those, applied in every place: {whole};
* reported as "{MERGED}" although the release has the fault: {silent}."""


def sizes(images: dict[str, dict[str, Any]]) -> str:
    """Figures of images by name, of sizes.json."""
    rows = []
    for _, image in sorted(images.items()):
        plain, foreign = image["system"] + image["wheels"], sum(image["targets"].values())
        smaller = f"{100 * (1 - image['image'] / plain):.1f} %"
        megabytes = [f"{size / MB:.0f}" for size in (plain, image["image"])]
        rows.append([image["line"], image["sku"], *megabytes, smaller, f"{foreign / MB:.0f} MB"])
    head = ["line", "SKU", "plain", "image", "smaller by", "foreign code left out"]
    lines = [table(head, rows)]
    for name, image in sorted(images.items()):
        libraries = list(image["libraries"].items())[:SHOWN]
        lines += ["", f"## {name}", "", f"`{image['digest']}`", ""]
        lines += [_megabytes(["layer", "MB"], image["layers"].items()), ""]
        lines += [_megabytes(["code for", "MB"], image["targets"].items()), ""]
        quoted = ((f"`{library}`", size) for library, size in libraries)
        lines.append(_megabytes(["library (the largest)", "MB left out"], quoted))
    return "\n".join(lines)


def _megabytes(head: list[str], sizes: Iterable[tuple[str, int]]) -> str:
    return table(head, ([name, f"{size / MB:.1f}"] for name, size in sizes))


def build_times(data: dict[str, Any]) -> str:
    """What ``bench build`` measured of a line."""
    on = f"`{data['command']}`, {data['date']}, {data['machine']['cpus']} cores:"
    seconds = [[stage, " ".join(map(str, each))] for stage, each in data["seconds"].items()]
    ratios = list(data["ratios"].items())
    return "\n\n".join([on, table(["stage", "s, each"], seconds), table(["ratio", ""], ratios)])


Row = dict[str, Any]
CONFIDENCE = 0.999
# The order of columns, and how they are called there.
TOOLS = (
    "bitwise, one input", "bitwise, two inputs in turn", "float64 bound", "other partition",
    "locks zero", "NaN left", "watchdog", "red zones", "memcheck", "initcheck", "racecheck",
    "synccheck", "SASS audit",
)  # fmt: skip
STATIC = "SASS audit"
SUMS = ("launches", "differ", "dirty")  # fields of launches


def race(data: Row) -> str:
    runs = [_run(entry["run"], entry["rows"]) for entry in data["runs"]]
    return "\n".join(runs).rstrip() or "not run"


def _run(run: Row, rows: list[Row]) -> str:
    count = {name: sum(row["outcome"] == name for row in rows) for name in ("passed", "failed")}
    others = len(rows) - sum(count.values())
    lines = [
        f"## {run['name']}, line {run['line']}, tier {run['tier']}\n",
        f"{run['started']}, driver {run['driver']}, tree {run['tree'][:12]}, suite "
        f"{run['suite_sha256'][:12]}. {len(rows)} tests of the tier are of this kernel: "
        f"{count['passed']} passed, {count['failed']} failed, {others} not run.\n",
    ]
    if bad := [row for row in rows if row["outcome"] != "passed"]:
        bad_tests = [f"* `{row['test']}`: {row.get('why') or row['outcome']}" for row in bad]
        lines += ["Not passed:\n", *bad_tests, ""]
    kinds = {kind: group for (kind,), group in _grouped(rows, "kind")}
    lines += _launches(kinds.get("bitwise", []))
    lines += _controls(kinds.get("control", []), kinds.get("table", []))
    return "\n".join(lines)


def _grouped(rows: Iterable[Row], *keys: str) -> list[tuple[tuple[str, ...], list[Row]]]:
    """Values of the keys ("" if missing) and their rows, sorted by the values."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row.get(key, "") for key in keys)].append(row)
    return sorted(groups.items())


def _launches(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    bad = sum(row["differ"] + row["dirty"] for row in rows)
    summary = f"{bad} launches are wrong."
    if not bad:
        summary = f"In total: {exclusion(sum(row['launches'] for row in rows))}."
    cells = []
    for place, group in _grouped(rows, "format", "mode"):
        sums = [sum(int(row.get(key, 0)) for row in group) for key in SUMS]
        margins = [row["margin"] for row in group if "margin" in row]
        cells.append([*place, len(group), *sums, f"{max(margins):.2f}" if margins else ""])
    head = ("format", "around it", "cells", "launches", "differ", "locks left", "of the bound")
    return ["### Launches\n", summary + "\n", table(head, cells), ""]


def exclusion(launches: int) -> str:
    """The fault rate that clean launches exclude, as a sentence.

    The exact upper limit for 0 of n (Clopper and Pearson, 1934): 1 - (1 - confidence)^(1/n).
    """
    rate = -math.expm1(math.log(1 - CONFIDENCE) / launches) if launches else 1.0
    return f"{launches:,} clean launches exclude p > {rate:.1e} at {100 * CONFIDENCE:g} %"


def _controls(controls: list[Row], tables: list[Row]) -> list[str]:
    detected: dict[str, dict[str, bool]] = defaultdict(dict)
    what: dict[str, str] = {}
    for row in controls:
        fault = row["fault"]
        what[fault] = what.get(fault) or row.get("what", "")
        detected[fault] |= {tool: tool in row["seen"] for tool in row["tools"]}
    for row in tables:
        for build in row["builds"]:
            detected[build].setdefault(row["tool"], row.get(f"sees {build}", False))
    if not detected:
        return []
    marks = {None: "", True: "X", False: "."}
    cells = [
        (f"`{fault}`", *(marks[tools.get(tool)] for tool in TOOLS))
        for fault, tools in detected.items()
    ]
    lines = ["### Faults and what detects them\n", table(("fault", *TOOLS), cells), ""]
    lines += [*(f"* `{fault}`: {text}" for fault, text in what.items()), ""]
    if blind := [
        f"* `{fault}`: {what.get(fault, '')}"
        for fault, tools in detected.items()
        if not any(tools.get(tool) for tool in TOOLS if tool != STATIC)
        and not what.get(fault, "").startswith(("no fault", "clean"))
    ]:
        lines += ["Not detected by anything that runs the kernel:\n", *blind, ""]
    if spared := [
        f"* `{row['fault']}` by {', '.join(row['tools'])}: {reason}"
        for row in controls
        if (reason := row.get("why_not_required")) and not row["seen"]
    ]:
        lines += ["Tried, not detected, and not required:\n", *spared, ""]
    return lines
