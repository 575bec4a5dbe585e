"""What benchmarks/quantize.py measured, as a table in docs/operate/checkpoints.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_forge.host.pages import Table

PAGE = Path("docs/operate/checkpoints.md")
RESULT = Path("benchmarks/results/quantize.json")
BEGIN, END = "<!-- measured: made by benchmarks/quantize.py -->", "<!-- end -->"
REAL = "DeepSeek-V4-Flash"


def measured(result: dict[str, Any]) -> str:
    """The table and the sentence below it."""
    lines = [
        "| model | size, GB | layers | largest layer, MB | CPU, s | peak memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["cases"].items():
        lines.append(
            f"| {name} | {row['model_bytes'] / 1e9:.2f} | {row['layers']} "
            f"| {row['largest_layer_bytes'] / 1e6:.0f} | {row['cpu_s']:.0f} "
            f"| {row['peak_bytes'] / 1e9:.2f} |"
        )
    machine, real = result["machine"], result[REAL]
    lines += [
        "",
        f"{result['date']}, recipe {result['recipe']} with {result['samples']} conversations, "
        f"{result['threads']} thread, {machine['cpus']} CPUs, Python {machine['python']}. GB are "
        "10^9 bytes. Importing the tools takes about 1 GB of the peak.",
        "",
        f"{REAL} ({real['how']}): a model of {real['model_bytes'] / 1e9:.0f} GB, its largest layer "
        f"{real['largest_layer_bytes'] / 1e9:.1f} GB; each byte of a layer adds "
        f"{real['peak_bytes_per_layer_byte']:.2f} bytes to the peak, hence "
        f"{real['peak_bytes'] / 1e9:.0f} GB of memory; an artifact of "
        f"{real['artifact_bytes'] / 1e9:.1f} GB ({real['artifact_bytes'] / 2**30:.1f} GiB).",
    ]
    return "\n".join(lines)


TABLE = Table(page=PAGE, result=RESULT, begin=BEGIN, end=END, make=measured)
