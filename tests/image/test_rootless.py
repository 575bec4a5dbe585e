"""A build by a user without rights: the same image as root's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.rootless import UID, missing, rootless
from vllm_forge.images.layout import read_image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.project import Project

pytestmark = pytest.mark.engine
ALPHA = "vllm-0.1.0-alpha"


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that another user can reach: pytest closes its own, while this test runs too."""
    with tempfile.TemporaryDirectory(prefix="vllm-forge-rootless-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def test_rootless_build_is_the_image_of_root(built: Project, shared: Path) -> None:
    """Debian's bytecode and the attributes of a rootless overlay would differ."""
    if (tools := missing()) or shutil.which("buildah") is None:
        pytest.skip(f"a rootless build needs {tools or 'buildah'}")
    fresh = built.copy(shared / "joe")
    for path in (shared / "joe", *(shared / "joe").rglob("*")):
        os.chown(path, UID, UID, follow_symlinks=False)
    build = [sys.executable, "-m", "vllm_forge", "build", "alpha", "--engine=buildah"]
    done = subprocess.run(
        rootless(build, shared / "namespace"),
        cwd=fresh.root, env=fresh.environment | {"HOME": str(shared / "joe")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = read_image(built.root / "dist" / ALPHA)
    image = read_image(fresh.root / "dist" / ALPHA)
    layers = [[layer["digest"] for layer in i.manifest["layers"]] for i in (expected, image)]
    assert layers[0] == layers[1]
    assert image.digest == expected.digest
