"""Write down every case of the GPU suite, which the verifier of receipts asks for.

    python -m tests.gpu.list_cases [records/gpu-cases.json]

Collects as pytest does on a GPU host; needs no GPU, no torch and no vLLM.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_forge.host import atomic_path
from vllm_forge.receipts.cases import FILE
from vllm_forge.receipts.suite import SM, Tier, read_tiers, suite_hash

REPO = Path(__file__).parents[2]


class Collected:
    """A plugin that keeps what was collected."""

    items: list[pytest.Item]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = list(session.items)


def collect(tier: Tier) -> dict[str, dict[str, list[str]]]:
    """Node id -> GPUs and engines of each case of a tier."""
    found = Collected()
    arguments = ["--collect-only", "-qq", "-p", "no:cacheprovider", f"--rootdir={REPO}"]
    if code := pytest.main([*arguments, *(str(REPO / name) for name in tier.folders)], [found]):
        raise SystemExit(f"pytest collects no tier {tier.name}: it exited with {int(code)}")
    rows = {}
    for item in found.items:
        own = item.get_closest_marker("tier")
        if own is not None and own.args[0] != tier.name:
            continue
        rows[item.nodeid] = {
            "archs": sorted(
                {mark.name for mark in item.iter_markers() if mark.name.startswith(SM)}
            ),
            "engines": sorted(
                {name for mark in item.iter_markers("engines") for name in mark.args}
            ),
        }
    return dict(sorted(rows.items()))


def main(argv: list[str]) -> int:
    tiers: dict[str, Any] = {
        name: {"suite_sha256": suite_hash(REPO, tier), "cases": collect(tier)}
        for name, tier in read_tiers(REPO).items()
    }
    path = Path(argv[0]) if argv else REPO / FILE
    with atomic_path(path) as aside:
        aside.write_text(json.dumps(tiers, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: " + ", ".join(f"{len(row['cases'])} {name}" for name, row in tiers.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
