"""Blocks made of benchmarks/results and of records/race.json."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from vllm_forge.pages.markdown import table

REAL = "DeepSeek-V4-Flash"
MB = 1_000_000
SHOWN = 12


def starts(result: dict[str, Any]) -> str:
    """One row per start; stages in the order of the log."""
    rows = result["rows"]
    stages = list(dict.fromkeys(name for row in rows for name in row["stages"]))
    return table(
        ["start", "GPU, line", "first token", *stages],
        (
            [
                row["start"],
                f"{row['gpu']}, {row['line']}",
                row["ended"] or f"{row['first_token']:.1f} s",
                *(f"{row['stages'][n]:.0f} s" if n in row["stages"] else "" for n in stages),
            ]
            for row in rows
        ),
    )


def quantization(result: dict[str, Any]) -> str:
    """Time and memory by the size of the model, and what the real model would need."""
    machine, real = result["machine"], result[REAL]
    cases = table(
        ["model", "size, GB", "layers", "largest layer, MB", "CPU, s", "peak memory, GB"],
        (
            [
                name,
                f"{row['model_bytes'] / 1e9:.2f}",
                row["layers"],
                f"{row['largest_layer_bytes'] / 1e6:.0f}",
                f"{row['cpu_s']:.0f}",
                f"{row['peak_bytes'] / 1e9:.2f}",
            ]
            for name, row in result["cases"].items()
        ),
    )
    return f"""{cases}

{result["date"]}, recipe {result["recipe"]} with {result["samples"]} conversations, \
{result["threads"]} thread, {machine["cpus"]} CPUs, Python {machine["python"]}.

{REAL} ({real["how"]}): a model of {real["model_bytes"] / 1e9:.0f} GB, its largest layer \
{real["largest_layer_bytes"] / 1e9:.1f} GB; each byte of a layer adds \
{real["peak_bytes_per_layer_byte"]:.2f} bytes to the peak, hence \
{real["peak_bytes"] / 1e9:.0f} GB of memory; an artifact of \
{real["artifact_bytes"] / 1e9:.1f} GB ({real["artifact_bytes"] / 2**30:.1f} GiB)."""


def inspection(result: dict[str, Any]) -> str:
    """Wall time of inspections at the real sizes."""
    machine = result["machine"]
    artifacts = table(
        ["artifact's layout", "tensors", "shards", "size, GB", "headers, s", "dry loads, s"],
        (
            [
                name,
                row["tensors"],
                row["shards"],
                f"{row['bytes'] / 1e9:.1f}",
                f"{row['headers_s']:.1f}",
                ", ".join(f"{line} {seconds:.0f}" for line, seconds in row["dry_load_s"].items()),
            ]
            for name, row in result["artifacts"].items()
        ),
    )
    return f"""{artifacts}

{result["date"]}, {machine["cpus"]} CPUs, Python {machine["python"]}. {result["load"]}"""


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
