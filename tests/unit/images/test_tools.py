"""Tools that are not installed: what is missing is named, and what apt says is shown."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from vllm_forge.host import Runner
from vllm_forge.images import tools
from vllm_forge.images.errors import ProvisionError

if TYPE_CHECKING:
    from pathlib import Path

LOCKED = "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 7"


@pytest.fixture(autouse=True)
def only_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with apt, whose database another program has locked, and with buildah."""
    for name, text in {"apt-get": f"echo '{LOCKED}' >&2; exit 100", "buildah": "exit 0"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    known = {name: str(tmp_path / name) for name in ("apt-get", "buildah")}
    monkeypatch.setattr(tools, "which", known.get)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def test_failure_of_apt_is_shown() -> None:
    with pytest.raises(ProvisionError) as failed:
        tools.provision(Runner())
    assert failed.value.what.startswith("apt-get could not install runc, skopeo, mmdebstrap:")
    assert LOCKED in failed.value.what
    assert "wait for another apt" in failed.value.remedy


def test_user_who_is_not_root_gets_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that is missing, and nothing that is there."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(
        ProvisionError, match="missing: runc, skopeo, mmdebstrap, docker"
    ) as refused:
        tools.provision(Runner(), registry=True)
    assert "recommends runc skopeo mmdebstrap docker-registry squashfs" in refused.value.remedy
