"""Put results of the GPU suite about the Marlin MoE into records/race.json, and write its page.

    python benchmarks/race.py RESULT.json...

A result is what a run of tier kernel or soak wrote, ``kernel.json`` or ``soak.json``; only its
tests of the Marlin MoE are used. It replaces the result of the same GPU, line and tier.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm_forge.host import atomic_path
from vllm_forge.pages.registry import write_pages
from vllm_forge.project import Project

Row = dict[str, Any]
TESTS = (
    "tests/gpu/race/", "tests/gpu/numerics/test_marlin_moe.py", "tests/gpu/soak/test_launches.py",
)  # fmt: skip
FACTS = (
    "kind", "cell", "format", "mode", "launches", "differ", "dirty", "margin", "excluded_p", "bad",
    "nan", "wrong", "weights", "fault", "what", "tools", "seen", "planted", "killed", "tool",
    "build", "builds", "reports", "new", "lost_clamp", "why_not_required",
)  # fmt: skip


def collect(path: Path) -> Row:
    """The run of a result, and what the page uses of each test of the Marlin MoE."""
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        _row(test, verdict)
        for test, verdict in sorted(result["tests"].items())
        if test.startswith(TESTS) and verdict["outcome"] != "other GPU"
    ]
    run = {name: result[name] for name in ("tier", "suite_sha256", "started", "finished")}
    run |= {name: result["plan"][name] for name in ("line", "tree")}
    run |= {name: result["gpus"][0][name] for name in ("name", "driver")}
    return {"run": run, "rows": rows}


def _row(test: str, verdict: Row) -> Row:
    facts = verdict["facts"]
    row = {name: facts[name] for name in FACTS if name in facts}
    row |= {name: value for name, value in facts.items() if name.startswith("sees ")}
    row |= {"test": test.rpartition("/")[2], "outcome": verdict["outcome"]}
    if verdict["why"]:
        row["why"] = verdict["why"][:200]
    return row


def record(project: Project, paths: list[Path]) -> None:
    """Replace the runs of the same GPU, line and tier in records/race.json."""
    target = project.records / "race.json"
    data = json.loads(target.read_text(encoding="utf-8"))
    for run in map(collect, paths):
        data["runs"] = [other for other in data["runs"] if _key(other) != _key(run)] + [run]
    with atomic_path(target) as aside:
        aside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _key(entry: Row) -> tuple[str, ...]:
    return tuple(entry["run"][name] for name in ("name", "line", "tier"))


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    here = Project.find()
    record(here, [Path(name) for name in sys.argv[1:]])
    write_pages(here, "docs/generated/race.md")
