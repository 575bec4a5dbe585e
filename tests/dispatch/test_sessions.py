"""Questions about quality, asked on a node of the real Slurm, and scored here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.sessions import write_quality
from vllm_forge.bench.quality import read_answers
from vllm_forge.bench.results import read_arm
from vllm_forge.dispatch.runs import local_folder
from vllm_forge.host.files import file_digest

if TYPE_CHECKING:
    from tests.dispatch.conftest import Lab

REPO = Path(__file__).parents[2]
ARTIFACT = "flash-nvfp4-fp8-mtp"
PORT = 8000  # in the job's network
# runc, which adds this host's Python and a GPU to an image that has a shell only.
RUNC = """#!{python}
import json, os, sys
from pathlib import Path
words = sys.argv[1:]
if "run" in words:
    path = Path(words[words.index("--bundle") + 1]) / "config.json"
    config = json.loads(path.read_text())
    for target, source in {mounts!r}.items():
        row = {{"destination": target, "type": "bind", "source": source}}
        config["mounts"].append(row | {{"options": ["rbind", "ro"]}})
    path.write_text(json.dumps(config))
os.execvp("runc", ["runc", *words])
"""
GPU = "0, NVIDIA B300 SXM6 AC, 10.3, 580.1, 288000, Disabled, Completed, Success"


def _program(folder: Path, text: str) -> str:
    folder.write_text(text)
    folder.chmod(0o755)
    return str(folder)


@pytest.fixture
def runc(tmp_path: Path) -> str:
    """For the site file, in place of runc."""
    places = [Path(path).resolve() for path in (sys.prefix, sys.base_prefix, REPO)]
    mounts = {str(path): str(path) for path in (*places, "/usr", "/lib", "/lib64")}
    mounts |= {
        "/opt/venv/bin/python": _program(
            tmp_path / "python", f'#!/bin/sh\nexec {Path(sys.prefix).resolve()}/bin/python "$@"\n'
        ),
        "/bin/nvidia-smi": _program(tmp_path / "nvidia-smi", f"#!/bin/sh\necho '{GPU}'\n"),
    }
    return _program(tmp_path / "runc", RUNC.format(python=sys.executable, mounts=mounts))


def _rooms(root: Path) -> None:
    """Have the code of benchmarks in the small checkout."""
    folder = root / "src/vllm_forge"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("host", "matrix", "bench", "errors.py"):
        (folder / name).symlink_to(REPO / "src/vllm_forge" / name)


def test_questions_are_asked_on_a_node_and_scored_here(lab: Lab, runc: str, tmp_path: Path) -> None:
    _rooms(lab.project.root)
    env = {"PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "src")])}
    session = write_quality(tmp_path, PORT, env, checkpoint=ARTIFACT)
    python = str(Path(sys.prefix).resolve() / "bin/python")
    session.write_text(session.read_text().replace("python3", python))
    site = lab.site()
    site.write_text(
        site.read_text().replace("minutes = 1", f'minutes = 1\nprogram = "{runc}"')
        + f'\n[checkpoints]\n{ARTIFACT} = "{tmp_path}"\n'
    )
    record = lab.send(site, "--skus=b300", f"--sessions={session}", "--minutes=5")
    document = lab.collect(record.run)
    (row,) = document["jobs"]
    assert row["verdict"] == "green", (row, _log(lab))
    assert document["receipts"] == []
    (spec,) = record.specs
    folder = local_folder(lab.project, record, spec.name) / "december"
    data, output = tmp_path / "own.data.jsonl", tmp_path / "mtp.json"
    options = [f"--sha256={file_digest(data)}", "--license=CC0", f"--output={output}"]
    for order in (0, 1):
        answers = folder / f"mtp-c2.answers-{order}.jsonl"
        assert read_answers(answers)[0].header.arm.server.image == spec.image
        lab.call("bench", "score", str(answers), "--workload=own", f"--data={data}", *options)
    arm = read_arm(output)
    assert arm.result.server.image == spec.image
    assert arm.result.server.gpu == "NVIDIA B300 SXM6 AC"
    assert [row.scores["strict"] for row in arm.rows] == [True, False, True, True] * 2


def _log(lab: Lab) -> str:
    return "\n".join(path.read_text()[-3000:] for path in lab.storage.glob("runs/*/logs/*.log"))
