"""A small real build with a real engine: what it makes, keeps, refuses and survives."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zstandard

from tests.image.conftest import engines
from tests.support.index_server import serve_folder
from tests.support.project import BASE_LOCK, CODE, LIBRARY, PATCHED, VLLM, Project, make_project
from tests.support.rootless import UID, missing, rootless
from vllm_forge.host.files import mounted_below
from vllm_forge.images.layout import Image, read_image, verify
from vllm_forge.project import Project as ForgeProject
from vllm_forge.release.registry import Reference, Repository
from vllm_forge.sources.debian import read_base_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.engine

ALPHA, BETA = "vllm-0.1.0-alpha", "vllm-0.1.0-beta"


def image(project: Project, cell: str = ALPHA) -> Image:
    return read_image(project.root / "dist" / cell)


def layers(made: Image) -> list[str]:
    return [layer["digest"] for layer in made.manifest["layers"]]


def plain(made: Image, layer: dict[str, Any]) -> bytes:
    blob = made.blob(layer["digest"]).read_bytes()
    if layer["mediaType"].endswith("+zstd"):
        return zstandard.ZstdDecompressor().decompressobj().decompress(blob)
    return gzip.decompress(blob)


def names(made: Image, layer: int) -> set[str]:
    content = plain(made, made.manifest["layers"][layer])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {member.name for member in tar}


def read(made: Image, layer: int, name: str) -> bytes:
    content = plain(made, made.manifest["layers"][layer])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        file = tar.extractfile(name)
        assert file is not None
        return file.read()


def test_layout_is_complete_and_readable_by_skopeo(built: Project) -> None:
    made = image(built)
    verify(made)
    seen = subprocess.run(
        ["skopeo", "inspect", f"oci:{made.path}"], capture_output=True, text=True, check=True
    )
    assert json.loads(seen.stdout)["Labels"]["io.vllm-forge.sku"] == "alpha"


def test_config_is_that_of_the_dockerfile(built: Project) -> None:
    config = image(built).config["config"]
    assert config["Entrypoint"] == ["vllm", "serve"]
    assert config["User"] == "10001:0"
    assert "/cache" in config["Volumes"]
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert "TORCH_CUDA_ARCH_LIST=10.0a" in config["Env"]
    (bytecode,) = [row for row in config["Env"] if row.startswith("PYTHONPYCACHEPREFIX=")]
    assert bytecode.partition("=")[2].startswith("/cache/python/")
    labels = config["Labels"]
    assert labels["io.vllm-forge.arch"] == "sm_100a"
    assert labels["io.vllm-forge.series"] == "0001-flag.patch"
    assert labels["io.vllm-forge.tree"] == built.record(ALPHA)["stack"]["tree"]


def test_volumes_can_be_written_by_any_user_of_group_0(built: Project) -> None:
    """A new volume gets the owner and mode of the image's folder."""
    made = image(built)
    content = plain(made, made.manifest["layers"][1])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for name in ("cache", "cache/huggingface"):
            folder = tar.getmember(name)
            assert (folder.uid, folder.gid, folder.mode & 0o777) == (10001, 0, 0o775)
    assert "HF_HOME=/cache/huggingface" in made.config["config"]["Env"]
    assert "HF_MODULES_CACHE=/cache/modules" in made.config["config"]["Env"]
    assert "PYTHONSAFEPATH=1" in made.config["config"]["Env"]


def test_every_diff_id_is_the_hash_of_its_layer(built: Project) -> None:
    made = image(built)
    for layer, diff_id in zip(
        made.manifest["layers"], made.config["rootfs"]["diff_ids"], strict=True
    ):
        assert hashlib.sha256(plain(made, layer)).hexdigest() == diff_id[7:]


def test_last_layer_holds_the_patch_and_the_metadata_only(built: Project) -> None:
    made = image(built)
    site = "opt/venv/lib/python3.13/site-packages"
    version = built.record(ALPHA)["stack"]["vllm"]
    files = {name for name in names(made, -1) if "." in name.rpartition("/")[2]}
    files = {name for name in files if not name.endswith((".dist-info", "python3.13"))}
    assert files == {
        "opt/vllm-forge/health.py",
        "opt/vllm-forge/stack.json",
        f"{site}/{PATCHED}",
        f"{site}/vllm/_version.py",
        f"{site}/vllm-{version}.dist-info/entry_points.txt",
    } | {f for f in files if f"vllm-{version}.dist-info" in f}
    assert b"is not None" in read(made, -1, f"{site}/{PATCHED}")
    assert b"is not None" not in read(made, -2, f"{site}/{PATCHED}")


def test_stack_json_is_the_record(built: Project) -> None:
    stack = json.loads(read(image(built), -1, "opt/vllm-forge/stack.json"))
    assert stack == built.record(ALPHA)["stack"]
    assert stack["packages"]["sixlike"] == "1.0"
    assert "python3" in stack["debian"]


def test_nothing_of_the_host_is_in_a_layer(built: Project) -> None:
    made = image(built)
    everything = set().union(*(names(made, number) for number in range(len(layers(made)))))
    assert not {name for name in everything if name.endswith(("ca.pem", "apt-sources.list"))}
    assert "etc/apt/sources.list" not in {name.removeprefix("./") for name in everything}


def test_second_run_does_nothing(built: Project) -> None:
    before = (built.root / "dist" / f"{ALPHA}.json").stat().st_mtime_ns
    asked = len(built.index.requests)
    done = built.run("build", "alpha")
    assert json.loads(done.stdout)["built"] is False
    assert (built.root / "dist" / f"{ALPHA}.json").stat().st_mtime_ns == before
    assert len(built.index.requests) == asked


def test_why_rebuild_names_the_patch_that_changed(built: Project, sibling: Project) -> None:
    assert built.run("why-rebuild", "--sku", "alpha").stdout == f"{ALPHA}: nothing changed\n"
    sibling.patch("bool(args and not args.dynamic)")
    output = sibling.run("why-rebuild", "--sku", "alpha").stdout
    assert output.splitlines()[:2] == [f"{ALPHA}: inputs changed", "  series"]
    assert "changed 0001-flag.patch: " in output
    assert "lock" not in output


def test_another_sku_has_its_own_libraries_and_last_layer_only(built: Project) -> None:
    done = built.run("build", "sm_120")
    assert own_layers(built) == {slim_layer(image(built)), len(layers(image(built))) - 1}
    assert "mmdebstrap" not in done.stderr
    assert "buildah bud" not in done.stderr


def own_layers(project: Project) -> set[int]:
    """Numbers of the layers that the two cells do not share."""
    pairs = zip(layers(image(project)), layers(image(project, BETA)), strict=True)
    return {number for number, (one, other) in enumerate(pairs) if one != other}


def slim_layer(made: Image) -> int:
    """Number of the layer with torch's libraries."""
    (found,) = [
        number
        for number, layer in enumerate(made.manifest["layers"])
        if layer["mediaType"].endswith("+zstd")
    ]
    return found


def test_image_holds_the_device_code_of_its_sku_only(built: Project) -> None:
    built.run("build", "sm_120")
    path = f"opt/venv/lib/python3.13/site-packages/{LIBRARY}"
    for cell, kept in ((ALPHA, 100), (BETA, 120)):
        made = image(built, cell)
        content = read(made, slim_layer(made), path)
        assert {arch for arch, code in CODE.items() if code in content} == {kept}
        removed = built.record(cell)["stack"]["slim"][path]
        assert removed["bytes"] == 2 * 4096
        assert set(removed["targets"]) == {f"cubin {arch}" for arch in CODE if arch != kept}
        for number in range(len(layers(made))):
            if number != slim_layer(made):
                assert path not in names(made, number)


def test_another_patch_changes_the_last_layer_only(built: Project, sibling: Project) -> None:
    sibling.patch("bool(args and not args.dynamic)")
    sibling.run("build", "alpha")
    before, after = layers(image(built)), layers(image(sibling))
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]


def test_dry_run_prints_the_commands_of_the_real_run(
    project: Project, first_build: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    """Without engine and network, and nothing is written."""
    fresh = project.copy(tmp_path)
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("apt-get", "git"):  # all but an engine
        (bare / tool).symlink_to(str(shutil.which(tool)))
    dry = fresh.run(
        "build", "alpha", "--dry-run", "--engine", project.record(ALPHA)["engine"],
        PATH=str(bare), UV_DEFAULT_INDEX="http://127.0.0.1:9/simple",
    )  # fmt: skip
    printed = [line for line in dry.stdout.splitlines() if not line.startswith("#")]
    assert not (fresh.root / "dist").exists()
    assert not fresh.cache.exists()
    ran = [
        line.strip().removeprefix("$ ")
        for line in first_build.stderr.splitlines()
        if line.strip().startswith("$ ")
    ]
    assert ran
    assert commands(printed, tmp_path) == commands(ran, project.root.parent)


def commands(lines: list[str], folder: Path) -> list[list[str]]:
    """Commands without the folder, whose hash is in the names of containers."""
    texts = [line.replace(str(folder), "FOLDER") for line in lines]
    return [shlex.split(re.sub(r"\bvllm-forge-[0-9a-f]{12}\b", "CONTAINER", t)) for t in texts]


@pytest.fixture(scope="module", params=engines() or ["none"])
def pair(built: Project, request: pytest.FixtureRequest) -> Iterator[tuple[Project, Project]]:
    """Two builds by an engine, the second from nothing, of packages that only a snapshot still has.

    It is of a user without rights, where this host can make one.
    """
    engine = request.param
    # Another user can reach it: pytest closes its own folders, while this fixture is in use too.
    with tempfile.TemporaryDirectory(prefix="vllm-forge-again-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        first = built
        if engine != built.record(ALPHA)["engine"]:
            first = built.copy(folder / "first", "debs")
            first.run("build", "alpha", "--engine", engine)
        again = first.copy(folder / "joe")
        no_mirrors = folder / "apt.conf"
        no_mirrors.write_text(
            'Dir::Etc::SourceList "/dev/null";\nDir::Etc::SourceParts "/dev/null";\n'
        )
        build = [sys.executable, "-m", "vllm_forge", "build", "alpha", f"--engine={engine}"]
        build.append("--base=locked")
        with serve_folder(snapshot_of(first, folder / "snapshot")) as url:
            matrix = again.root / "matrix.toml"
            row = f'[base]\nsnapshots = ["{url}{{date}}"]\n'
            matrix.write_text(matrix.read_text().replace("[base]\n", row))
            if not lacks_for_rootless(engine):
                for path in (folder / "joe", *(folder / "joe").rglob("*")):
                    os.chown(path, UID, UID, follow_symlinks=False)
                build = rootless(build, folder / "namespace")
            environment = {"HOME": str(folder / "joe"), "APT_CONFIG": str(no_mirrors)}
            done = subprocess.run(
                build, cwd=again.root, env=again.environment | environment,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        assert done.returncode == 0, done.stderr
        yield first, again


def lacks_for_rootless(engine: str) -> str:
    """What a rootless build by this engine needs and this host lacks; empty if nothing."""
    return missing() if engine == "buildah" else "buildah"


def snapshot_of(project: Project, folder: Path) -> Path:
    """A folder like a snapshot of Debian's archive, with the locked packages of a build."""
    lock = read_base_lock(project.root, ForgeProject(project.root).matrix.base)
    assert lock is not None
    for package in lock.packages:
        (file,) = (project.cache / "debs" / package.sha256).iterdir()
        path = folder / lock.date / package.path
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, path)
    return folder


def test_two_builds_give_one_digest(pair: tuple[Project, Project]) -> None:
    first, again = map(image, pair)
    assert layers(first) == layers(again)
    assert first.digest == again.digest


def test_rootless_build_is_the_image_of_root(pair: tuple[Project, Project]) -> None:
    """Debian's bytecode and the attributes of a rootless overlay would differ."""
    root, user = pair
    if lacking := lacks_for_rootless(root.record(ALPHA)["engine"]):
        pytest.skip(f"a rootless build needs {lacking}")
    assert (user.root / "dist" / ALPHA).stat().st_uid == UID
    assert layers(image(root)) == layers(image(user))


def test_push_and_pull_by_digest(built: Project, registry: str, tmp_path: Path) -> None:
    reference = f"{registry}/vllm:alpha"
    built.run("build", "alpha", "--push", reference)
    digest = f"sha256:{image(built).digest}"
    assert Repository(Reference.parse(reference)).resolve("alpha") == digest
    subprocess.run(
        [
            "skopeo", "copy", "--quiet", "--src-tls-verify=false",
            f"docker://{registry}/vllm@{digest}", f"oci:{tmp_path / 'pulled'}",
        ],
        check=True,
    )  # fmt: skip
    pulled = read_image(tmp_path / "pulled")
    verify(pulled)
    assert f"sha256:{pulled.digest}" == digest


def test_registry_base_must_be_pinned(built: Project) -> None:
    done = built.run("build", "alpha", "--base", "debian:trixie-slim", code=60)
    assert "@sha256" in done.stderr


def test_registry_base_gets_what_it_lacks(
    built: Project, registry: str, sibling: Project, tmp_path: Path
) -> None:
    """A base from a registry, pinned by digest; the Dockerfile installs the missing package."""
    rootfs = next((built.cache / "rootfs").iterdir())
    subprocess.run(
        [
            "skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{rootfs}",
            f"docker://{registry}/base:1",
        ],
        check=True,
    )  # fmt: skip
    digest = read_image(rootfs).digest
    insecure = tmp_path / "registries.conf"
    insecure.write_text(f'[[registry]]\nlocation = "{registry}"\ninsecure = true\n')
    matrix = sibling.root / "matrix.toml"
    text = matrix.read_text().replace('"ca-certificates", ', '"ca-certificates", "bsdextrautils", ')
    matrix.write_text(text)
    sibling.run(
        "build", "alpha", "--base", f"{registry}/base@sha256:{digest}",
        CONTAINERS_REGISTRIES_CONF=str(insecure),
    )  # fmt: skip
    assert "bsdextrautils" in sibling.record(ALPHA)["stack"]["debian"]
    assert "usr/bin/column" in {n.removeprefix("./") for n in names(image(sibling), 1)}


# Of a build: where it is killed, and what of a finished one it may use from there on.
MOMENTS: dict[str, tuple[str, ...]] = {
    "fetch 3 wheels": (),
    "mmdebstrap": (),
    "buildah bud": (),
    "assemble the image": ("rootfs",),  # which may have been killed while it was compressed
    "runc": (),
    "its name": (),
}


def test_kill_9_leaves_no_image_and_the_next_run_succeeds(built: Project, tmp_path: Path) -> None:
    """Each run gets beyond the moment at which the one before it was killed."""
    fresh = built.copy(tmp_path, "debs")
    for moment, kept in MOMENTS.items():
        built.lend(fresh, *kept)
        process = fresh.start("build", "alpha", "--engine", "buildah")
        assert process.stderr is not None
        assert any(moment in line for line in process.stderr), moment
        process.send_signal(signal.SIGKILL)
        process.communicate()  # ends only when all that inherited the pipe has ended
        assert process.returncode == -signal.SIGKILL, moment
        assert not (fresh.root / "dist" / f"{ALPHA}.json").exists(), moment
        if (fresh.root / "dist" / ALPHA).exists():  # killed between the two renames
            verify(image(fresh))
    fresh.run("build", "alpha", "--engine", "buildah")
    verify(image(fresh))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts of a namespace go with it: run it as root")
def test_mounts_of_a_killed_build_are_cleaned(built: Project, tmp_path: Path) -> None:
    """buildah mounts a container where a build does: none is killed at a lucky moment."""
    fresh = built.copy(tmp_path)
    state = fresh.cache / "buildah"
    storage = [
        "--root",
        str(state / "store"),
        "--runroot",
        str(state / "run"),
        "--storage-driver=overlay",
    ]
    for argv in (["from", "--name=left", "scratch"], ["mount", "left"]):
        subprocess.run(["buildah", *storage, *argv], check=True)
    assert any(point.name == "merged" for point in mounted_below(fresh.cache))
    fresh.run("clean")
    assert mounted_below(fresh.cache) == []
    assert not state.exists()


def test_two_builds_of_one_cell_at_once(built: Project, tmp_path: Path) -> None:
    fresh = built.copy(tmp_path, "rootfs")
    with fresh.start("build", "alpha", "--engine", "buildah") as first:
        assert first.stderr is not None
        assert any("buildah bud" in line for line in first.stderr)
        second = fresh.run("build", "alpha", "--engine", "buildah", code=33)
        assert f"process {first.pid}" in second.stderr
        first.communicate()
    assert first.returncode == 0


def test_module_that_does_not_import_fails_the_build(built: Project, tmp_path: Path) -> None:
    broken = "vllm/model_executor/layers/quantization/broken.py"
    project = make_project(tmp_path, {broken: "import absent_package\n"}, base=built)
    done = project.run("build", "alpha", code=61)
    assert "absent_package" in done.stderr
    assert not (project.root / "dist").exists()
    matrix = project.root / "matrix.toml"
    name = "vllm.model_executor.layers.quantization.broken"
    row = f'\n[line.mini.unimportable]\n"{name}" = "needs what a test does not have"\n[artifact]'
    matrix.write_text(matrix.read_text().replace("\n[artifact]", row))
    project.run("build", "alpha")
    stale = matrix.read_text().replace(name, "vllm.model_executor.layers.quantization.fp8")
    matrix.write_text(stale)
    assert "but they import" in project.run("build", "alpha", code=61).stderr
    project.index.close()


FORGED = b"""import sys, os; 'image_checks.py' in ' '.join(sys.orig_argv) and (os.write(1, \
b'{"packages": {"passed": true, "detail": "forged", "seconds": 0.0}}\\n'), os._exit(0))
"""


def test_wheel_that_forges_verdicts_fails_the_build(built: Project, tmp_path: Path) -> None:
    """Its .pth file ends every Python that looks at site-packages, after an answer of its own."""
    more = {"evil.pth": FORGED, "vllm/evil.py": b""}
    project = make_project(tmp_path, more=more, base=built)
    done = project.run("build", "alpha", code=61)
    site = "/opt/venv/lib/python3.13/site-packages"
    assert f"file that runs when Python starts: {site}/evil.pth of sixlike" in done.stderr
    assert f"file in the package vllm: {site}/vllm/evil.py of sixlike" in done.stderr
    assert "imports: died" in done.stderr
    assert "forged" not in done.stderr
    assert "ok packages: 3 distributions" in done.stderr
    assert not (project.root / "dist").exists()
    project.index.close()


def test_size_budget_is_enforced(sibling: Project) -> None:
    matrix = sibling.root / "matrix.toml"
    matrix.write_text(matrix.read_text().replace("budget_mb = 120", "budget_mb = 1"))
    before = image(sibling).digest
    done = sibling.run("build", "alpha", code=61)
    assert "its budget is 1 MB" in done.stderr
    assert image(sibling).digest == before, "the last good image is still there"


def test_shortened_layer_is_built_again(sibling: Project) -> None:
    made = image(sibling)
    blob = made.blob(layers(made)[-1])
    content = blob.read_bytes()
    blob.unlink()
    blob.write_bytes(content[:-1])
    assert json.loads(sibling.run("build", "alpha").stdout)["built"] is True
    verify(image(sibling))


def test_tampered_layer_of_equal_size_is_built_again(sibling: Project) -> None:
    made = image(sibling)
    blob = made.blob(layers(made)[-2])
    content = bytearray(blob.read_bytes())
    content[100] ^= 1
    blob.unlink()
    blob.write_bytes(content)
    assert json.loads(sibling.run("build", "alpha").stdout)["built"] is True
    verify(image(sibling))


def test_tampered_cache_fails_one_build_and_is_deleted(built: Project, tmp_path: Path) -> None:
    """A kept layer that was changed fails the build, is forgotten, and is written again."""
    fresh = built.copy(tmp_path, "rootfs", "systems", "layers")
    made = image(built)
    (blob,) = (
        path
        for path in (fresh.cache / "layers").glob("*/layer.tar.gz")
        if path.stat().st_size == made.manifest["layers"][-3]["size"]
    )
    content = bytearray(blob.read_bytes())
    content[100] ^= 1
    blob.write_bytes(content)
    fresh.run("build", "alpha", code=60)
    assert not blob.exists()
    assert not (fresh.root / "dist").exists()
    fresh.run("build", "alpha")
    verify(image(fresh))


def test_small_disk_is_reported_before_anything_is_written(built: Project, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounts a small file system: run as root")
    small = built.copy(tmp_path)
    small.cache.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(small.cache)], check=True
    )
    try:
        done = small.run("build", "alpha", code=33)
        assert "are needed" in done.stderr
        assert {path.name for path in small.cache.iterdir()} <= {"locks"}
    finally:
        subprocess.run(["umount", str(small.cache)], check=True)
    assert not (small.root / "dist").exists()


def test_two_cells_at_once_share_one_system(built: Project, tmp_path: Path) -> None:
    """The second waits for the engine, then takes what the first one made."""
    fresh = built.copy(tmp_path, "rootfs")
    with fresh.start("build", "alpha") as first, fresh.start("build", "beta") as second:
        outputs = [process.communicate()[1] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    builds = ["buildah bud", "buildx build"]
    assert sum(text.count(word) for text in outputs for word in builds) == 1
    assert own_layers(fresh) == {slim_layer(image(fresh)), len(layers(image(fresh))) - 1}


def test_missing_engine_names_the_packages(built: Project, tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "git").symlink_to(str(shutil.which("git")))
    done = built.run("build", "beta", PATH=str(bare), code=63)
    assert "apt-get install" in done.stderr
    done = built.run("build", "beta", "--engine", "buildah", PATH=str(bare), code=63)
    assert "--provision" in done.stderr
    done = built.run("build", "beta", "--engine", "biuldah", code=2)
    assert "did you mean 'buildah'?" in done.stderr


def test_old_engine_is_refused(built: Project, sibling: Project, tmp_path: Path) -> None:
    old = tmp_path / "bin"
    old.mkdir()
    (old / "buildah").write_text("#!/bin/sh\necho buildah version 1.19.6\n")
    (old / "buildah").chmod(0o755)
    sibling.patch("args is not None and args.dynamic is False")
    done = sibling.run(
        "build", "alpha", "--engine", "buildah", PATH=f"{old}:{os.environ['PATH']}", code=63
    )
    assert "1.19.6" in done.stderr


def test_index_that_serves_other_bytes_is_refused(built: Project, tmp_path: Path) -> None:
    fresh = built.copy(tmp_path, "rootfs", "systems")
    served = built.index.projects["sixlike"]["sixlike-1.0-py3-none-any.whl"]
    good = served.content
    served.content = bytes(reversed(good))
    try:
        fresh.run("build", "alpha", code=20)
    finally:
        served.content = good
    assert not (fresh.root / "dist").exists()
    fresh.run("build", "alpha")


def test_series_changes_one_line_of_the_tiny_vllm(built: Project) -> None:
    """The fixture's own premise: the patch changes one line of the tiny vllm."""
    assert "args and not args.dynamic" in VLLM[PATCHED]
    assert built.record(ALPHA)["stack"]["changed_files"].keys() == {PATCHED}


def test_rebuilds_leave_published_images_unchanged(built: Project, tmp_path: Path) -> None:
    """Blobs are shared by hard links, so no stage may write into an existing file."""
    fresh = built.copy(tmp_path, "rootfs", "systems", "layers")
    fresh.run("build", "alpha")
    fresh.run("build", "beta")
    matrix = fresh.root / "matrix.toml"
    dockerfile = fresh.root / "docker" / "Dockerfile"
    changes: dict[str, Callable[[], object]] = {
        "patch": lambda: fresh.patch("bool(args) and not args.dynamic"),
        "dockerfile": lambda: dockerfile.write_text(dockerfile.read_text() + "\n# changed\n"),
        "rootfs": lambda: matrix.write_text(
            matrix.read_text()
            .replace('"ca-certificates", ', '"ca-certificates", "less", ')
            .replace(f'lock = "{BASE_LOCK}"\n', "")
        ),
    }
    published = fresh.root / "published"
    published.mkdir()
    expected: dict[Path, bytes] = {}
    for name, change in changes.items():
        kept = published / name
        shutil.copytree(fresh.root / "dist", kept, copy_function=os.link)
        expected |= {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
        change()
        fresh.run("build", "alpha")
        changed = [path for path, content in expected.items() if path.read_bytes() != content]
        assert not changed, f"{name}: {changed}"
    verify(image(fresh, BETA))
    for blob in (fresh.root / "dist").glob("*/blobs/sha256/*"):
        assert not blob.stat().st_mode & 0o222, blob
