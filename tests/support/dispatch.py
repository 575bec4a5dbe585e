"""A small project whose images are a shell and a suite whose answers a test chooses."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.receipts import FILE, green_result, list_cases, row, small_project
from vllm_forge.gputest.launch import make_plan
from vllm_forge.images.layer import LayerBlob
from vllm_forge.images.layout import Image, ImageLayer, write_image
from vllm_forge.patches import read_tree_lock
from vllm_forge.receipts.suite import read_suite, suite_hash

if TYPE_CHECKING:
    from vllm_forge.gputest.launch import SuiteImage
    from vllm_forge.matrix import ImageCell
    from vllm_forge.project import Project

REPO = Path(__file__).parents[2]
BUSYBOX = Path("/bin/busybox")
TIERS = ("kernel", "server", "tp2")
# In place of the image's Python. FAKE_<TIER>, from the site file, says how a tier ends.
SUITE = r"""#!/bin/sh
tier=${5#--tier=}
. /opt/cell
answer() {
    digest=$(sed -n 's/.* "sha256": "\([0-9a-f]*\)".*/\1/p' /forge/plan.json)
    sed "s/DIGEST/$digest/; s/\"exit\": 0/\"exit\": $1/" "/opt/$tier.json" > "/output/$tier.json"
    echo '<testsuites/>' > "/output/$tier.xml"
}
eval "told=\${FAKE_${sku}_$tier:-green}"
echo "$tier of $sku is $told on GPUs $NVIDIA_VISIBLE_DEVICES"
case $told in
green) answer 0 ;;
red) answer 1; exit 91 ;;
held) : > /output/started; while [ ! -e /output/go ]; do sleep 0.1; done; answer 0 ;;
slow) : > /output/started; trap 'answer 1; exit 92' TERM; while :; do sleep 1; done ;;
stuck) printf '{"half' > "/output/$tier.json"; : > /output/started; trap '' TERM
    while :; do sleep 1; done ;;
esac
"""
FOLDERS = ("bin", "dev", "etc", "forge", "opt", "opt/venv", "opt/venv/bin", "output", "proc", "sys",
           "tmp", "usr", "usr/bin")  # fmt: skip


def make_project(folder: Path) -> Project:
    """The small project of receipts, with a tier kernel."""
    project = small_project(REPO, folder)
    with (folder / "tests/gpu/suite.toml").open("a") as file:
        for name, gpus in {"kernel": 1, "tp8": 8}.items():
            file.write(f'[tier.{name}]\nfolders = ["tests/gpu/mtp"]\nminutes = 1\n')
            file.write(f"gpus = {gpus}\non_request = {str(gpus > 1).lower()}\n")
    list_cases(folder)
    return project


def green(project: Project, cell: ImageCell, tier: str) -> dict[str, Any]:
    """The result of a green run of a tier in a cell's image; its digest is to be filled in."""
    sku, line = cell.sku, cell.line_name
    here = {f"{FILE}::test_elsewhere": "12.0", f"{FILE}::TestGroup::test_three": "9.0"}
    tests = {f"{FILE}::test_one": row(margins={"drafts": {"measured": 1.0, "bound": 16.0}})}
    tests |= {f"{FILE}::test_two[{number}]": row() for number in (1, 2)}
    for name, capability in here.items():
        run = sku.compute_capability == capability
        tests[name] = row() if run else row(outcome="other GPU", why="of another SKU")
    result = green_result(
        project.matrix, tests, tier=tier,
        tree=read_tree_lock(project.root / cell.line.series, line).result,
        lock=project.lock(line).digest, suite=suite_hash(project, tier, cell.sku_name),
    )  # fmt: skip
    result["plan"] |= {"sku": cell.sku_name, "line": line}
    result["plan"]["subject"] = {"name": cell.name, "sha256": "DIGEST"}
    gpu = result["gpus"][0] | {"name": sku.device, "compute_capability": sku.compute_capability}
    count = read_suite(project.root).tier[tier].gpus
    result["gpus"] = [gpu | {"uuid_sha256": str(number) * 64} for number in range(count)]
    result["configurations"]["other"] = {"moe": []}
    return result


def _layer(path: Path, files: dict[str, tuple[int, bytes]]) -> LayerBlob:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in FOLDERS:
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(member)
        for name, (mode, content) in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), mode
            archive.addfile(member, io.BytesIO(content))
        for name in ("bin/sh", "usr/bin/env"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, "/bin/busybox"
            archive.addfile(member)
    packed = gzip.compress(tar.getvalue(), compresslevel=1, mtime=0)
    path.write_bytes(packed)
    return LayerBlob(
        path=path,
        digest=hashlib.sha256(packed).hexdigest(),
        diff_id=hashlib.sha256(tar.getvalue()).hexdigest(),
        size=len(packed),
    )


def make_image(project: Project, cell: ImageCell, scratch: Path) -> Image:
    """An image of a cell in the project's dist."""
    busybox = BUSYBOX if BUSYBOX.exists() else Path("/usr") / BUSYBOX.relative_to("/")
    tree = read_tree_lock(project.root / cell.line.series, cell.line_name).result
    labels = {
        "sku": cell.sku_name, "line": cell.line_name, "tree": tree,
        "lock": f"sha256:{project.lock(cell.line_name).digest}",
    }  # fmt: skip
    files = {
        "bin/busybox": (0o755, busybox.read_bytes()),
        "opt/venv/bin/python": (0o755, SUITE.encode()),
        "opt/cell": (0o644, f"sku={cell.sku_name}\n".encode()),
        **{
            f"opt/{tier}.json": (0o644, json.dumps(green(project, cell, tier)).encode())
            for tier in TIERS
        },
    }
    config = {
        "Env": ["PATH=/bin:/usr/bin"],
        "WorkingDir": "/",
        "Volumes": {"/tmp": {}},
        "Entrypoint": ["/bin/sh"],
        "Labels": {f"io.vllm-forge.{name}": value for name, value in labels.items()},
    }
    layer = ImageLayer(blob=_layer(scratch / f"{cell.name}.layer", files), name="all")
    return write_image(
        project.root / "dist" / cell.name, layers=[layer], config=config,
        epoch=cell.base.source_date_epoch, name=f"localhost/{cell.name}:{cell.line_name}",
    )  # fmt: skip


def write_bundle(project: Project, cell: ImageCell, image: SuiteImage, folder: Path) -> Any:
    """The plan alone: what else goes to a GPU host has tests of its own, and takes gigabytes."""
    tree = read_tree_lock(project.root / cell.line.series, cell.line_name).result
    (folder / "src/vllm_forge").mkdir(parents=True)
    (folder / "src/vllm_forge/__init__.py").touch()
    plan = make_plan(project, cell, tree, image)
    (folder / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    return plan
