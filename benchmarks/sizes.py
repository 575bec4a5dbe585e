"""What an image weighs beside the plain environment of its lock, and what made the difference.

    python benchmarks/sizes.py   # reads dist/*.json; writes results and their page

The plain environment is what ``pip install`` of the lock would transfer on top of the same
system: the sum of the wheels. Rows of cells that are not in dist/ stay as they were.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from vllm_forge.host import atomic_path
from vllm_forge.pages.registry import write_pages
from vllm_forge.project import Project

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "sizes.json"


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


def main() -> None:
    """Take in what dist/ has; write the results and the page."""
    rows: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for path in sorted((ROOT / "dist").glob("vllm-*.json")):
        rows[path.stem] = row(json.loads(path.read_text()))
    with atomic_path(RESULTS) as aside:
        aside.write_text(json.dumps(rows, indent=1) + "\n")
    write_pages(Project(ROOT), "docs/generated/sizes.md")


if __name__ == "__main__":
    main()
