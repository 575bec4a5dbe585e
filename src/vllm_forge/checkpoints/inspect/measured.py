"""What benchmarks/inspect_checkpoint.py measured, as a table in docs/checkpoints.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_forge.errors import UsageError
from vllm_forge.host import atomic_path

RESULT = Path("benchmarks/results/inspect.json")
PAGE = Path("docs/checkpoints.md")
BEGIN, END = "<!-- inspected: made by benchmarks/inspect_checkpoint.py -->", "<!-- inspected -->"


def measured(result: dict[str, Any]) -> str:
    """The table and the sentence below it."""
    lines = [
        "| artifact's layout | tensors | shards | size, GB | headers and gates, s | dry loads, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["artifacts"].items():
        loads = ", ".join(f"{line} {seconds:.0f}" for line, seconds in row["dry_load_s"].items())
        lines.append(
            f"| {name} | {row['tensors']} | {row['shards']} | {row['bytes'] / 1e9:.1f} "
            f"| {row['headers_s']:.1f} | {loads} |"
        )
    machine = result["machine"]
    lines += [
        "",
        f"{result['date']}, {machine['cpus']} CPUs, Python {machine['python']}, wall time of whole "
        "commands. The layouts have the real sizes, with holes for data (sparse files): what is "
        "measured are headers, single scales and gates; and vLLM's imports, constructors and "
        "loader, which see no data either. " + result["load"],
    ]
    return "\n".join(lines)


def with_measured(page: str, result: dict[str, Any]) -> str:
    """The page with its table made anew.

    Raises:
        UsageError: the page has no place for it.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"no {BEGIN} ... {END}", where=str(PAGE))
    return f"{head}{BEGIN}\n{measured(result)}\n{END}{tail}"


def write_measured(root: Path) -> None:
    """Make the table in the page from the result file."""
    result = json.loads((root / RESULT).read_text(encoding="utf-8"))
    page = (root / PAGE).read_text(encoding="utf-8")
    with atomic_path(root / PAGE) as aside:
        aside.write_text(with_measured(page, result), encoding="utf-8")
