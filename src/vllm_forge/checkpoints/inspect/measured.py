"""What benchmarks/inspect_checkpoint.py measured, as a table in docs/operate/checkpoints.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_forge.checkpoints.measured import PAGE
from vllm_forge.host.pages import Table

RESULT = Path("benchmarks/results/inspect.json")
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


TABLE = Table(page=PAGE, result=RESULT, begin=BEGIN, end=END, make=measured)
