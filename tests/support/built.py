"""An image of the small project with its record, for what is said about images."""

from __future__ import annotations

import json
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.fast_build import fast_build, use
from tests.support.project import Project as MiniProject
from tests.support.project import make_project
from vllm_forge.project import Project

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vllm_forge.images import Image
    from vllm_forge.matrix import ImageCell

CRATES = {
    "bomFormat": "CycloneDX",
    "specVersion": "1.5",
    "version": 1,
    "components": [
        {
            "type": "library", "bom-ref": "a", "name": "adler2", "version": "2.0.1",
            "purl": "pkg:cargo/adler2@2.0.1", "licenses": [{"expression": "MIT OR Apache-2.0"}],
            "hashes": [{"alg": "SHA-256", "content": "ad" * 32}],
        },
        {
            "type": "library", "bom-ref": "b", "name": "libz", "version": "1.3",
            "components": [{"type": "library", "bom-ref": "c", "name": "inner", "version": "1"}],
        },
        {
            "type": "library", "bom-ref": "d", "name": "sixlike", "version": "1.0",
            "purl": "pkg:pypi/sixlike@1.0?file_name=sixlike-1.0.whl",
        },
    ],
}  # fmt: skip
SBOM = "sixlike-1.0.dist-info/sboms/rust.cyclonedx.json"
VENDORED = "sixlike/_vendor/Tiny_Lib-1.2.dist-info"
MORE = {
    SBOM: json.dumps(CRATES).encode(),
    f"{VENDORED}/METADATA": b"Metadata-Version: 2.1\nName: Tiny_Lib\nVersion: 1.2\n\nText\n",
}


@dataclass(frozen=True)
class Built:
    """``mini`` is the small project; ``record`` that of the build of cell alpha."""

    mini: MiniProject
    project: Project
    cell: ImageCell
    image: Image

    @property
    def record(self) -> dict[str, Any]:
        return self.mini.record(self.cell.name)


@contextmanager
def built_image(folder: Path) -> Iterator[Built]:
    """Build alpha; one of its wheels has an SBOM and a vendored distribution."""
    mini = make_project(folder, more=MORE)
    try:
        with pytest.MonkeyPatch.context() as patch:
            use(mini, patch)
            image, _ = fast_build(mini, "alpha")
        project = Project(mini.root)
        yield Built(mini=mini, project=project, cell=project.cell("alpha"), image=image)
    finally:
        mini.index.close()


def commit_all(root: Path) -> str:
    """Make a folder a git repository with one commit; returns the commit."""
    (root / ".gitignore").write_text("dist/\n")
    who = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    for argv in (["init", "-q"], ["add", "--all"], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", "-C", root, *argv], check=True, capture_output=True)
    argv = ["git", "-C", str(root), "rev-parse", "HEAD"]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
