"""Tests that run programs in a sandbox: skipped only where the host has no namespaces at all."""

from __future__ import annotations

import os
import subprocess

import pytest

from vllm_forge.bench.sandbox import NAMESPACES
from vllm_forge.host import which


def require_isolation() -> None:
    """Skip on hosts without namespaces. A sandbox that fails elsewhere fails the test."""
    if (tool := which("unshare")) is None:
        pytest.skip("no unshare: install util-linux")
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    done = subprocess.run(
        [tool, *user, *NAMESPACES, "true"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no namespaces ({done.stderr.strip()}): run this as root, outside a container")
