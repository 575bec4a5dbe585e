"""Write down every case of the GPU suite, which the verifier of receipts asks for.

    python -m tests.support.list_gpu_cases [records/gpu-cases.json]

Collects as pytest does on a GPU host; needs no GPU, no torch and no vLLM.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_forge.host import atomic_path
from vllm_forge.matrix import load
from vllm_forge.receipts.suite import CASES, MATRIX_ROWS, Tier, read_suite, sources_hash

REPO = Path(__file__).parents[2]


class Collected:
    """A plugin that keeps what was collected."""

    items: list[pytest.Item]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = list(session.items)


def collect(name: str, tier: Tier) -> dict[str, dict[str, Any]]:
    """Node id -> GPUs and engines of each case of a tier."""
    plugin, matrix = Collected(), load(REPO)
    # Which cases there are depends on no single SKU's row.
    rows = {row: MATRIX_ROWS[row](matrix, next(iter(matrix.sku))) for row in tier.matrix}
    os.environ["VLLM_FORGE_GPU_MATRIX"] = json.dumps(rows)
    arguments = ["--collect-only", "-qq", "-p", "no:cacheprovider", f"--rootdir={REPO}"]
    if code := pytest.main([*arguments, *(str(REPO / name) for name in tier.folders)], [plugin]):
        raise SystemExit(f"cannot collect tier {name}: pytest exited with {int(code)}")
    cases = {}
    for item in plugin.items:
        own = item.get_closest_marker("tier")
        if own is None or name in own.args:
            archs = {mark.name for mark in item.iter_markers() if mark.name.startswith("sm_")}
            engines = {name for mark in item.iter_markers("engines") for name in mark.args}
            margins = "margin" in getattr(item, "fixturenames", ())
            cases[item.nodeid] = {
                "archs": sorted(archs), "engines": sorted(engines), "margins": margins
            }  # fmt: skip
    return dict(sorted(cases.items()))


def main(argv: list[str]) -> int:
    tiers: dict[str, Any] = {
        name: {"sources_sha256": sources_hash(REPO, name), "cases": collect(name, tier)}
        for name, tier in read_suite(REPO).tier.items()
    }
    path = Path(argv[0]) if argv else REPO / CASES
    with atomic_path(path) as aside:
        aside.write_text(json.dumps(tiers, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: " + ", ".join(f"{len(row['cases'])} {name}" for name, row in tiers.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
