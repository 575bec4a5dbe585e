"""docs/generated/race.md, from records/race.json: the GPU suite's results of the Marlin MoE."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from vllm_forge.pages.markdown import table

Row = dict[str, Any]
CONFIDENCE = 0.999
# The order of columns, and how they are called there.
TOOLS = (
    "bitwise, one input", "bitwise, two inputs in turn", "float64 bound", "other partition",
    "locks zero", "NaN left", "watchdog", "red zones", "memcheck", "initcheck", "racecheck",
    "synccheck", "SASS audit",
)  # fmt: skip
STATIC = "SASS audit"


def race(data: Row) -> str:
    """The page of records/race.json."""
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
    numerics = kinds.get("numerics", []) + kinds.get("partitions", [])
    lines += _launches(kinds.get("bitwise", []))
    lines += _controls(kinds.get("control", []), kinds.get("table", []))
    lines += _numerics(numerics, kinds.get("kill", []))
    lines += _memory(kinds.get("red_zones", []), kinds.get("sanitizer", []))
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
    cells = [
        (*place, len(group), *(_sum(group, key) for key in ("launches", "differ", "dirty")),
         _most(group))
        for place, group in _grouped(rows, "format", "mode")
    ]  # fmt: skip
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


def _numerics(rows: list[Row], kills: list[Row]) -> list[str]:
    if not rows and not kills:
        return []
    cells = [
        (form, _sum(group, "launches"), _most(group), _sum(group, "weights"), _sum(group, "wrong"))
        for (form,), group in _grouped(rows, "format")
    ]
    head = ("format", "launches", "of the bound, at most", "weights read", "wrong")
    planted, killed = _sum(kills, "planted"), _sum(kills, "killed")
    summary = f"Faults planted in weights and results: {killed} of {planted} detected."
    return ["### Numerics\n", table(head, cells), "", summary, ""]


def _memory(red_zones: list[Row], sanitizers: list[Row]) -> list[str]:
    lines = [
        f"{row['launches']} launches between red zones: {row['bad']} buffers written around, "
        f"{row['nan']} results with NaN."
        for row in red_zones
    ]
    if sanitizers:
        checkers = [
            (row["tool"], row["build"], sum(r["count"] for r in row["reports"]), len(row["new"]))
            for row in sanitizers
        ]
        head = ("checker", "build", "reports", "not in the baseline")
        lines += ["", table(head, checkers)]
    return ["### Memory\n", *lines, ""] if lines else []


def _most(rows: Iterable[Row]) -> str:
    margins = [row["margin"] for row in rows if "margin" in row]
    return f"{max(margins):.2f}" if margins else ""


def _sum(rows: Iterable[Row], key: str) -> int:
    return sum(int(row.get(key, 0)) for row in rows)
