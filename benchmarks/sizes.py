"""What an image weighs beside the plain environment of its lock, and what made the difference.

    python benchmarks/sizes.py   # reads dist/*.json; writes results and docs/generated/sizes.md

The plain environment is what ``pip install`` of the lock would transfer on top of the same
system: the sum of the wheels. Rows of cells that are not in dist/ stay as they were.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from vllm_forge.host import atomic_path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "sizes.json"
PAGE = ROOT / "docs" / "generated" / "sizes.md"
MB = 1_000_000
SHOWN = 12


def row(record: dict[str, Any]) -> dict[str, Any]:
    """The figures of one image, from the record of its build."""
    stack = record["stack"]
    targets: Counter[str] = Counter()
    libraries = {}
    for path, what in stack["slim"].items():
        targets.update(what["targets"])
        libraries[path.partition("/site-packages/")[2]] = what["bytes"]
    system = sum(layer["size"] for layer in record["layers"] if layer["system"])
    return {
        "line": stack["line"],
        "sku": stack["sku"],
        "arch": stack["arch"],
        "digest": record["digest"],
        "image": record["size"],
        "system": system,
        "wheels": record["wheels"],
        "layers": {layer["name"]: layer["size"] for layer in record["layers"]},
        "targets": dict(sorted(targets.items())),
        "libraries": dict(sorted(libraries.items(), key=lambda item: -item[1])),
    }


def page(rows: dict[str, dict[str, Any]]) -> str:
    """docs/generated/sizes.md."""
    lines = [
        "# Sizes",
        "",
        "Written by `python benchmarks/sizes.py` from the records of builds. MB are 10^6 bytes as",
        "transferred. Plain: the same system plus the lock's wheels as they are.",
        "",
        "| line | SKU | plain | image | smaller by | foreign code left out |",
        "|---|---|---|---|---|---|",
    ]
    for _, one in sorted(rows.items()):
        plain = one["system"] + one["wheels"]
        lines.append(
            f"| {one['line']} | {one['sku']} | {plain / MB:.0f} | {one['image'] / MB:.0f} | "
            f"{100 * (1 - one['image'] / plain):.1f} % | "
            f"{sum(one['targets'].values()) / MB:.0f} MB |"
        )
    for name, one in sorted(rows.items()):
        lines += ["", f"## {name}", "", f"`{one['digest']}`", "", "| layer | MB |", "|---|---|"]
        lines += [f"| {layer} | {size / MB:.1f} |" for layer, size in one["layers"].items()]
        lines += ["", "| code for | MB |", "|---|---|"]
        lines += [f"| {target} | {size / MB:.1f} |" for target, size in one["targets"].items()]
        lines += ["", "| library (the largest) | MB left out |", "|---|---|"]
        largest = list(one["libraries"].items())[:SHOWN]
        lines += [f"| `{library}` | {size / MB:.1f} |" for library, size in largest]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Take in what dist/ has; write both files."""
    rows: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for path in sorted((ROOT / "dist").glob("vllm-*.json")):
        rows[path.stem] = row(json.loads(path.read_text()))
    with atomic_path(RESULTS) as aside:
        aside.write_text(json.dumps(rows, indent=1) + "\n")
    with atomic_path(PAGE) as aside:
        aside.write_text(page(rows))


if __name__ == "__main__":
    main()
