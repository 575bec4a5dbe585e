"""A tier of the GPU suite, run by its own runner on stand-ins for vLLM, torch and the driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.gpu.harness import device, plugin

if TYPE_CHECKING:
    from collections.abc import Mapping

Rows = dict[str, dict[str, Any]]


def run_tier(
    tier: str, code: Path, output: Path, preset: Any, *, only: str = "",
    env: Mapping[str, str] | None = None,
) -> Rows:  # fmt: skip
    """Name of a test -> its row, of two GPUs. ``code``: the suite, and the stand-ins in ``fake``.

    ``preset``: the rows of matrix.toml that the tier reads.
    """
    results = output / "results.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "tests.gpu.harness.plugin",
            "-p", "fake_gpu", "-p", "no:cacheprovider", f"--tier={tier}", f"--rootdir={code}",
            "-k", only, f"tests/gpu/{tier}",
        ],
        cwd=code,
        env={
            **os.environ,
            **(env or {}),
            "PATH": f"{code / 'fake'}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(map(str, (code, code / "src", code / "fake"))),
            device.NAMED: "0,1",
            device.RANKS: "2",
            plugin.RESULTS: str(results),
            "VLLM_FORGE_GPU_FOLDER": str(output),
            "VLLM_FORGE_GPU_MATRIX": json.dumps({"preset": preset}),
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert results.is_file(), done.stdout + done.stderr
    assert not (output / tier).exists()
    tests = json.loads(results.read_text())["tests"]
    return {name.rpartition("::")[2]: row for name, row in tests.items()}
