"""The table of starts in docs/develop/gpu-suite.md: time to the first token, and what takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_forge.host.pages import Table

RESULT = Path("benchmarks/results/first-token.json")
BEGIN, END = "<!-- starts: made by benchmarks/first_token.py -->", "<!-- starts -->"


def starts(result: dict[str, Any]) -> str:
    """One row per start; stages in the order of the log."""
    rows = result["rows"]
    stages = list(dict.fromkeys(name for row in rows for name in row["stages"]))
    head = ["start", "GPU, line", "first token", *stages]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        first = row["ended"] or f"{row['first_token']:.1f} s"
        spans = [f"{row['stages'][n]:.0f} s" if n in row["stages"] else "" for n in stages]
        cells = [row["start"], f"{row['gpu']}, {row['line']}", first, *spans]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLE = Table(
    page=Path("docs/develop/gpu-suite.md"), result=RESULT, begin=BEGIN, end=END, make=starts
)
