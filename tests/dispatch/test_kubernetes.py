"""A pod by hand: what a manifest says, done by mount and chroot. No cluster has seen one."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.support.dispatch import make_image, make_project, write_bundle
from tests.support.kubernetes import Api, rule_problems, schema_problems
from vllm_forge.cli import main
from vllm_forge.dispatch import runs
from vllm_forge.dispatch.runs import read_record

if TYPE_CHECKING:
    from vllm_forge.images.layout import Image

SITE = """schema_version = 1
runtime = "runc"
registry = "registry.lab:5000/forge/vllm"

[storage]
root = "{storage}"

[env]
FAKE_b300_server = "red"

[kubernetes]
claim = "forge"

[kubernetes.sku.b300]
product = "NVIDIA-B300-SXM6-AC"
gpus = 8
"""
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount what a pod has"),
    pytest.mark.skipif(
        not shutil.which("busybox"), reason="needs busybox: apt-get install busybox"
    ),
]


def run_pod(job: dict[str, Any], index: int, storage: Path, image: Image, work: Path) -> int:
    """Run an index of a Job on this host's files, with /opt of the image; its exit code."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    root = work / "root"
    for folder in (root, work / "tmpfs"):
        folder.mkdir(parents=True)
    upper = work / "tmpfs" / "upper"
    (layer,) = image.layers
    unpack = ["tar", "--extract", f"--file={layer.blob.path}", f"--directory={upper}", "opt"]
    steps = [
        ["mount", "-t", "tmpfs", "tmpfs", str(work / "tmpfs")],
        ["mkdir", str(upper), str(work / "tmpfs" / "work")],
        unpack,
        ["mount", "-t", "overlay", "overlay", str(root), "-o",
         f"lowerdir=/,upperdir={upper},workdir={work / 'tmpfs' / 'work'}"],
    ]  # fmt: skip
    steps.append(["mount", "--rbind", "/dev", f"{root}/dev"])
    for mount in container["volumeMounts"]:
        if mount["name"] == "storage":
            place = f"{root}{mount['mountPath']}"
            steps.append(["mkdir", "-p", place])
            steps.append(["mount", "--bind", str(storage / mount["subPath"]), place])
            if mount.get("readOnly"):
                steps.append(["mount", "-o", "remount,bind,ro", place])
    values = {row["name"]: row.get("value", f"pod-{index}") for row in container["env"]}
    values |= {
        "JOB_COMPLETION_INDEX": str(index),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }
    variables = [f"{name}={value}" for name, value in values.items()]
    steps.append(["exec", "chroot", str(root), "/usr/bin/env", "-i", *variables,
                  *container["command"]])  # fmt: skip
    script = "\n".join(map(shlex.join, steps))
    argv = ["unshare", "--mount", "--propagation=private", "sh", "-ec", script]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    print(done.stderr)  # shown where the test fails
    return done.returncode


def test_pods_leave_results_that_are_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    project, storage = make_project(tmp_path / "checkout"), tmp_path / "storage"
    storage.mkdir()
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(project.root))
    monkeypatch.setattr(runs, "write_bundle", write_bundle)
    image = make_image(project, project.cell("b300", "0.26"), tmp_path)
    site = tmp_path / "site.toml"
    site.write_text(SITE.format(storage=storage))
    argv = ["--skus=b300", "--lines=0.26", "--tiers=kernel,server", f"--site={site}"]
    assert main(["dispatch", "--to=kubernetes", *argv]) == 0
    record = read_record(project, None)
    (manifest,) = (record.folder / "manifests").iterdir()
    assert f"kubectl apply -f {manifest.parent}" in capfd.readouterr().err
    job = yaml.safe_load(manifest.read_text())
    assert schema_problems(job) + rule_problems(job) == []
    assert job["spec"]["completions"] == 2

    api = Api(record.attempts["b300-0.26-kernel"])
    monkeypatch.setattr("vllm_forge.commands.dispatch.HostProbe", lambda: api)
    assert main(["dispatch", "status"]) == 0
    assert capfd.readouterr().out.count("run: kubectl apply -f") == 2
    codes = [run_pod(job, index, storage, image, tmp_path / f"pod-{index}") for index in (0, 1)]
    assert codes == [0, 91]
    markers = record.folder.glob("results/*/*.done")
    assert {path.stem for path in markers} == {"pod-0", "pod-1"}  # no pod writes to another's
    assert 91 in job["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]
    api.has_job(completions=2, completedIndexes="0", failedIndexes="1")
    assert main(["dispatch", "collect"]) == 91
    out = capfd.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if "b300-0.26" in line}
    assert "green" in rows["b300-0.26-kernel"]
    assert "red" in rows["b300-0.26-server"]
    (receipt,) = (project.root / "records" / "receipts").rglob("*.json")
    assert "kernel" in receipt.name
    assert not Path("/output").exists()
