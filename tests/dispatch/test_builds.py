"""`dispatch build` on the real Slurm; a stand-in builds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from vllm_forge.dispatch import builds
from vllm_forge.host import parse_json

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from tests.dispatch.conftest import Lab

# python -m vllm_forge build SKU --line LINE ...: one image fails.
BUILD = """#!/bin/sh
test "$4" = rtxpro6000 && exit 61
echo "{\\"digest\\": \\"sha256:$4\\", \\"image\\": \\"/built/$4-$6\\"}"
"""


def test_lines_are_built_on_nodes(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, site = tmp_path / "python", lab.site()
    program.write_text(BUILD)
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(builds, "fill_folder", lambda *_: None)
    text = site.read_text()
    argv = ["dispatch", "build", "--lines=0.22,0.26", f"--site={site}"]
    argv.append("--skus=b300,rtxpro6000")

    site.write_text(f'{text}\n[slurm.build]\npartition = "b300s"\n')
    wrong = "slurm.build.partition: no partition 'b300s' (did you mean 'b300'?)"
    assert wrong in lab.call(*argv, code=90)
    assert not (lab.storage / "builds").exists()

    site.write_text(f'{text}\n[slurm.build]\npartition = "b300"\n')
    out = lab.call(*argv, code=93)
    assert "not built: rtxpro6000 (0.26)" in out, out
    built = {
        path.name: parse_json(path.read_text()) for path in lab.storage.glob("builds/*/*.json")
    }
    assert built == {
        f"b300-{line}.json": {"digest": "sha256:b300", "image": f"/built/b300-{line}"}
        for line in ("0.22", "0.26")
    }
