"""Blocks of docs/generated/measurements.md and sizes.md, from benchmarks/results."""

from __future__ import annotations

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
{result["threads"]} thread, {machine["cpus"]} CPUs, Python {machine["python"]}. Importing the \
tools takes about 1 GB of the peak.

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

{result["date"]}, {machine["cpus"]} CPUs, Python {machine["python"]}, wall time of whole commands. \
The layouts have the real sizes, with holes for data (sparse files). Measured are: headers, single \
scales and checks; vLLM's imports, constructors and loader, which read no data either. \
{result["load"]}"""


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
