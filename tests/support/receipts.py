"""The result of a green tier, as ``tests.gpu.harness.run`` writes it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_forge.matrix import Matrix

IMAGE = "d19e57" + "0" * 58
NOW = datetime.now(UTC).replace(microsecond=0)


def row(**changes: Any) -> dict[str, Any]:
    """A test's row."""
    blank = {"outcome": "passed", "seconds": 1.5, "margins": {}, "facts": {}, "why": ""}
    return {**blank, **changes}


def green_result(matrix: Matrix, tests: dict[str, Any], *, tree: str, suite: str) -> dict[str, Any]:
    """A run of tier server on an H200, line 0.26, in the image ``IMAGE``."""
    sku = matrix.sku["h200"]
    return {
        "schema": 1,
        "plan": {
            "sku": "h200",
            "line": "0.26",
            "tree": tree,
            "subject": {"name": "kit", "sha256": IMAGE},
        },
        "tier": "server",
        "suite_sha256": suite,
        "started": (NOW - timedelta(minutes=5)).isoformat(),
        "finished": NOW.isoformat(),
        "exit": 0,
        "gpus": [
            {
                "name": sku.device,
                "uuid_sha256": "0" * 64,
                "compute_capability": sku.compute_capability,
                "driver": "580.159.04",
                "memory_mib": 143771,
            }
        ],
        "host": {"python": "3.12.3", "cuda": "13.0", "packages": {"torch": "2.11.0+cu130"}},
        "configurations": {"plain": {"moe": []}},
        "tests": tests,
    }
