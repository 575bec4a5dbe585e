"""vLLM's own tests, as published and as patched: what passes only as published is a regression.

The tests are in the bundle's ``upstream``, with the plugins of pytest that they need. Patched is
the installed package; published is that package with the release's own files where the series has
others (``variants/published``). A test that passes in neither says what it lacks.
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from tests.gpu.harness import limits, processes, variants

ROOT = Path(__file__).parents[3]
with Path(__file__).with_name("rows.toml").open("rb") as _file:
    ROWS = tomllib.load(_file)
SCRIPT = Path(__file__).with_name("run_tests.py")
TREES = ("published", "patched")


def lay_published(work: Path, root: Path = ROOT) -> dict[str, str]:
    """Make the package as published; tree -> the folder that is searched before the others."""
    files, target = root / "variants" / TREES[0], work / TREES[0]
    over = variants.lay_over(variants.installed(), files, target)
    return dict(zip(TREES, (str(over), ""), strict=True))


def run(about: str, path: str, log: Path, root: Path = ROOT) -> dict[str, Any]:
    """Run a row's tests on a tree: what run_tests.py says of them; no test where it died."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    tests = [path for path in ROWS[about]["tests"] if (root / "upstream" / path).is_file()]
    argv = [sys.executable, str(SCRIPT), str(root / "upstream"), "", "2", *tests]
    argv += ["--continue-on-collection-errors", *ROWS[about].get("options", ())]
    # As long as the budget lasts.
    processes.run(argv, log, env | {"PYTHONPATH": path}, limits.limit("artifact"))
    lines = log.read_text(errors="replace").splitlines() or ["it printed nothing"]
    said = next((line for line in reversed(lines) if line.startswith('{"exit": ')), None)
    return dict(json.loads(said)) if said else {"tests": {}, "reasons": {"": lines[-1]}}


def judge(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Of a row as published and as patched: outcomes by file, and why tests have not passed.

    Raises:
        AssertionError: a test passes only as published.
        NotStartedError: none passes as published.
    """
    tests: dict[str, str] = before["tests"]
    lost = [name for name, outcome in tests.items()
            if outcome == "passed" != after["tests"].get(name)]  # fmt: skip
    reasons = after["reasons"]
    why = [f"{name}: {reasons.get(name, reasons.get(''))}" for name in lost[:3]]
    assert not lost, f"{len(lost)} tests pass as published, not as patched: {why}"
    lacks = dict(Counter(why[:160] for why in before["reasons"].values()).most_common(12))
    if "passed" not in tests.values():
        raise limits.NotStartedError(f"nothing passes as published: {lacks or 'no such tests'}")
    files: dict[str, Counter[str]] = {}
    for name, old in tests.items():
        new = after["tests"].get(name, "missing")
        files.setdefault(name.partition("::")[0], Counter())[
            old if old == new else f"{old}, then {new}"
        ] += 1
    return {"files": {name: dict(counts) for name, counts in files.items()}, "lacks": lacks}
