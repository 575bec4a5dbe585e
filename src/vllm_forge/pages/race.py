"""docs/generated/race.md, rendered from records/race.json, the results of the GPU suite.

    python -m vllm_forge.pages.race RESULT.json...

A result is what a run of tier kernel or soak wrote, ``kernel.json`` or ``soak.json``; only its
tests of the Marlin MoE are used. It replaces the one of the same GPU, line and tier.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.gpu.reference.power import exclusion

from vllm_forge.host import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Row = dict[str, Any]
ROOT = Path(__file__).parents[3]
DATA, PAGE = Path("records/race.json"), Path("docs/generated/race.md")
# The order of columns, and how they are called there.
TOOLS = (
    "bitwise, one input", "bitwise, two inputs in turn", "float64 bound", "other partition",
    "locks zero", "NaN left", "watchdog", "red zones", "memcheck", "initcheck", "racecheck",
    "synccheck", "SASS audit",
)  # fmt: skip
STATIC = {"SASS audit"}
TESTS = (
    "tests/gpu/race/", "tests/gpu/numerics/test_marlin_moe.py", "tests/gpu/soak/test_launches.py",
)  # fmt: skip
NAMES = (
    "kind", "cell", "format", "mode", "launches", "differ", "dirty", "margin", "excluded_p", "bad",
    "nan", "wrong", "weights", "fault", "what", "tools", "seen", "planted", "killed", "tool",
    "build", "builds", "reports", "new", "lost_clamp", "why_not_required",
)  # fmt: skip
HEAD = """# Marlin MoE under concurrent decode

Whether the kernel that serves the experts gives the same bits launch after launch, within a bound
that is known beforehand, and whether the tests that say so see faults at all. Generated from
[race.json](race.json) by `python -m vllm_forge.pages.race`; do not edit.
"""
NOT_RUN = """
not run

On a GPU host: `nox -s test-gpu -- --sku SKU --tier kernel`.
"""
MEANING = """
**X** sees it, **.** does not, blank: was not asked. *bitwise* compares with the first result of the
same input; with one input a block that reads `c_tmp` too early finds there what it should have
waited for, left by the launch before, so two inputs take turns. *locks zero* looks at the
workspace after a launch, *NaN left* at a result that was NaN before, *watchdog* at a launch that
does not end. racecheck looks at shared memory only. The audit reads the machine code.
"""


def collect(path: Path) -> Row:
    """What a result says of the Marlin MoE: its run, and of each test what the page uses."""
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        _row(test, said)
        for test, said in sorted(result["tests"].items())
        if test.startswith(TESTS) and said["outcome"] != "other GPU"
    ]
    run = {name: result[name] for name in ("tier", "suite_sha256", "started", "finished")}
    run |= {name: result["plan"][name] for name in ("line", "tree")}
    run |= {name: result["gpus"][0][name] for name in ("name", "driver")}
    return {"run": run, "rows": rows}


def _row(test: str, said: Row) -> Row:
    facts = said["facts"]
    kept = {name: facts[name] for name in NAMES if name in facts}
    kept |= {name: value for name, value in facts.items() if name.startswith("sees ")}
    kept |= {"test": test.rpartition("/")[2], "outcome": said["outcome"]}
    if said["why"]:
        kept["why"] = said["why"][:200]
    return kept


def render(data: Row) -> str:
    """The page, from nothing but the data."""
    if not data["runs"]:
        return HEAD + NOT_RUN
    return HEAD + "".join(_run(one["run"], one["rows"]) for one in data["runs"])


def _run(run: Row, rows: list[Row]) -> str:
    count = {name: sum(row["outcome"] == name for row in rows) for name in ("passed", "failed")}
    others = len(rows) - sum(count.values())
    parts = [
        f"\n## {run['name']}, line {run['line']}, tier {run['tier']}\n",
        f"{run['started']}, driver {run['driver']}, tree {run['tree'][:12]}, suite "
        f"{run['suite_sha256'][:12]}. {len(rows)} tests of the tier are of this kernel: "
        f"{count['passed']} passed, {count['failed']} failed, {others} not run.\n",
        _failed(rows),
        _launches(rows),
        _controls(rows),
        _numerics(rows),
        _memory(rows),
    ]
    return "\n".join(part for part in parts if part)


def _failed(rows: list[Row]) -> str:
    bad = [row for row in rows if row["outcome"] != "passed"]
    if not bad:
        return ""
    lines = [f"* `{row['test']}`: {row.get('why') or row['outcome']}" for row in bad]
    return "\n".join(["Not green:\n", *lines, ""])


def _launches(rows: list[Row]) -> str:
    mine = [row for row in rows if row.get("kind") == "bitwise"]
    if not mine:
        return ""
    total = sum(row["launches"] for row in mine)
    bad = sum(row["differ"] + row["dirty"] for row in mine)
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in mine:
        groups[row["format"], row["mode"]].append(row)
    table = [
        (form, mode, len(group), *(_sum(group, key) for key in ("launches", "differ", "dirty")),
         _most(group))
        for (form, mode), group in sorted(groups.items())
    ]  # fmt: skip
    said = f"All together: {exclusion(total)}." if not bad else f"{bad} launches are wrong."
    head = ("format", "around it", "cells", "launches", "differ", "locks left", "of the bound")
    return "\n".join(["### Launches\n", said + "\n", _table(head, table), ""])


def _controls(rows: list[Row]) -> str:
    found: dict[str, dict[str, bool]] = defaultdict(dict)
    what: dict[str, str] = {}
    for row in rows:
        if row.get("kind") == "control":
            what.setdefault(row["fault"], row.get("what", ""))
            what[row["fault"]] = what[row["fault"]] or row.get("what", "")
            for tool in row["tools"]:
                found[row["fault"]][tool] = tool in row["seen"]
        elif row.get("kind") == "table":
            for build in row["builds"]:
                found[build].setdefault(row["tool"], row.get(f"sees {build}", False))
    if not found:
        return ""
    table = [
        (f"`{fault}`", *(_mark(tools.get(tool)) for tool in TOOLS))
        for fault, tools in found.items()
    ]
    blind = [
        f"* `{fault}`: {what.get(fault, '')}"
        for fault, tools in found.items()
        if not any(tools.get(tool) for tool in TOOLS if tool not in STATIC)
        and not what.get(fault, "").startswith(("no fault", "clean"))
    ]
    names = [f"* `{fault}`: {text}" for fault, text in what.items()]
    out = ["### Faults and what sees them\n", _table(("fault", *TOOLS), table), MEANING, *names, ""]
    if blind:
        out += ["Seen by nothing that runs the kernel:\n", *blind, ""]
    spared = [
        f"* `{row['fault']}` by {', '.join(row['tools'])}: {reason}"
        for row in rows
        if (reason := row.get("why_not_required")) and not row["seen"]
    ]
    if spared:
        out += ["Asked and not seen, without being red:\n", *spared, ""]
    return "\n".join(out)


def _numerics(rows: list[Row]) -> str:
    mine = [row for row in rows if row.get("kind") in {"numerics", "partitions"}]
    kills = [row for row in rows if row.get("kind") == "kill"]
    if not mine and not kills:
        return ""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in mine:
        groups[row["format"]].append(row)
    table = [
        (form, _sum(group, "launches"), _most(group),
         _sum(group, "weights"), _sum(group, "wrong"))
        for form, group in sorted(groups.items())
    ]  # fmt: skip
    head = ("format", "launches", "of the bound, at most", "weights read", "wrong")
    planted, killed = _sum(kills, "planted"), _sum(kills, "killed")
    said = f"Faults planted in weights and results: {killed} of {planted} noticed."
    return "\n".join(["### Numerics\n", _table(head, table), "", said, ""])


def _memory(rows: list[Row]) -> str:
    out = [
        f"{row['launches']} launches between red zones: {row['bad']} buffers written around, "
        f"{row['nan']} results with NaN."
        for row in rows
        if row.get("kind") == "red_zones"
    ]
    table = [
        (row["tool"], row["build"], sum(r["count"] for r in row["reports"]), len(row["new"]))
        for row in rows
        if row.get("kind") == "sanitizer"
    ]
    if table:
        out += ["", _table(("checker", "build", "reports", "not in the baseline"), table)]
    return "\n".join(["### Memory\n", *out, ""]) if out else ""


def _mark(seen: bool | None) -> str:
    return "" if seen is None else "X" if seen else "."


def _most(rows: Iterable[Row]) -> str:
    margins = [row["margin"] for row in rows if "margin" in row]
    return f"{max(margins):.2f}" if margins else ""


def _sum(rows: Iterable[Row], key: str) -> int:
    return sum(int(row.get(key, 0)) for row in rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Put results into records/race.json and write the page."""
    parser = argparse.ArgumentParser(prog="vllm_forge.pages.race")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT")
    args = parser.parse_args(argv)
    data = json.loads((ROOT / DATA).read_text(encoding="utf-8"))
    for made in map(collect, args.results):
        data["runs"] = [one for one in data["runs"] if _key(one) != _key(made)] + [made]
    for path, text in ((DATA, json.dumps(data, indent=1) + "\n"), (PAGE, render(data))):
        with atomic_path(ROOT / path) as aside:
            aside.write_text(text, encoding="utf-8")
    return 0


def _key(one: Row) -> tuple[str, ...]:
    return tuple(one["run"][name] for name in ("name", "line", "tier"))


if __name__ == "__main__":
    sys.exit(main())
