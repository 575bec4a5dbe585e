"""docs/generated/sizes.md and what it says of slimming come from the records of builds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

REPO = Path(__file__).parents[3]
GOAL = 0.30


def test_page_is_made_from_the_data() -> None:
    spec = importlib.util.spec_from_file_location("sizes", REPO / "benchmarks" / "sizes.py")
    assert spec is not None and spec.loader is not None
    sizes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sizes)
    rows = json.loads(sizes.RESULTS.read_text())
    assert sizes.PAGE.read_text() == sizes.page(rows), "run: python benchmarks/sizes.py"
    for name, row in rows.items():
        plain = row["system"] + row["wheels"]
        assert row["image"] <= (1 - GOAL) * plain, f"{name} is not slim"


def test_slim_libraries_computed_the_same_on_a_gpu() -> None:
    """What docs/operate/build.md says of the H200 run."""
    found = json.loads((REPO / "benchmarks" / "results" / "slim-h200.json").read_text())
    assert {row["slim"] for row in found["operations"].values()} == {"same"}
    assert found["control"] == "failed"
