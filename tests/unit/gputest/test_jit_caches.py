"""Compiled kernels travel with the key of their stack, and are refused for another one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import zstandard

from tests.gpu.harness import run as harness
from tests.gpu.harness.errors import InputError
from tests.support.receipts import IMAGE, green_run, small_project
from vllm_forge.gputest import launch as product
from vllm_forge.gputest.errors import JitCacheError
from vllm_forge.gputest.launch import cache_key, lock_prewarm, prewarm_of, require_key
from vllm_forge.images.errors import ForeignFileError
from vllm_forge.images.prewarm import (
    BAKED,
    CONTENT,
    ENTRYPOINT,
    FOLDERS,
    PLACE,
    SCRIPT,
    Prewarm,
    place_of,
    prewarm_layer,
    prewarm_lock,
    tree_digest,
    unpack_prewarm,
)
from vllm_forge.matrix.errors import RecordFileError
from vllm_forge.patches import read_tree_lock
from vllm_forge.project import Project
from vllm_forge.receipts.verification import make_receipt
from vllm_forge.sources import read_lock

if TYPE_CHECKING:
    from pathlib import Path

KEY = {"compute_capability": "9.0", "tree": "7c43", "kind": "image", "stack": "10cc"}
PLAN = {"caches": {"folders": FOLDERS, "key": KEY}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Caches with one compiled kernel."""
    path = tmp_path / "caches"
    harness.open_caches(path, PLAN)
    (path / "triton" / "k").mkdir()
    (path / "triton" / "k" / "kernel.cubin").write_bytes(b"code")
    return path


def test_caches_are_keyed_by_the_lock(root: Path) -> None:
    cell = Project(root).cell("h200", "0.26")
    key = cache_key(Project(root), cell, "7c43")
    assert key["stack"] == read_lock(root, "0.26", cell.line, cell.base).digest
    assert set(key) == set(KEY)


def test_each_compiler_has_a_folder(folder: Path) -> None:
    variables = harness.open_caches(folder, PLAN)
    assert variables["TRITON_CACHE_DIR"] == str(folder / "triton")
    assert set(variables) == set(FOLDERS.values())
    assert all((folder / name).is_dir() for name in FOLDERS)
    assert harness.count_files(folder) == 1


@pytest.mark.parametrize("name", sorted(KEY))
def test_caches_of_another_stack_are_refused(folder: Path, name: str) -> None:
    key = KEY | {name: "other"}
    with pytest.raises(InputError, match="of another stack"):
        harness.open_caches(folder, {"caches": {"folders": {}, "key": key}})
    with pytest.raises(JitCacheError, match=f"{name} is .*, expected other"):
        require_key(folder, key)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", "null", '{"tree": 1}'])
def test_a_folder_without_a_valid_key_is_refused(folder: Path, content: str | None) -> None:
    (folder / product.KEY).unlink()
    if content is not None:
        (folder / product.KEY).write_text(content)
    with pytest.raises(InputError, match="not of the suite"):
        harness.open_caches(folder, PLAN)
    with pytest.raises(JitCacheError, match="key of the caches of a run"):
        require_key(folder, KEY)


def test_caches_with_links_are_refused(folder: Path, tmp_path: Path) -> None:
    """Code of the image wrote them: neither an image nor a kit takes files of the host so."""
    require_key(folder, KEY)
    (folder / "triton" / "evil").symlink_to(tmp_path)
    with pytest.raises(ForeignFileError, match="evil is a link"):
        require_key(folder, KEY)


def test_an_image_carries_the_kernels_of_its_own_stack_only(root: Path, tmp_path: Path) -> None:
    cell = Project(root).cell("h200", "0.26")
    tree = read_tree_lock(root / cell.line.series, "0.26").result
    key = cache_key(Project(root), cell, tree)
    for name, stack in {"own": {}, "environment": {"kind": "environment"}}.items():
        plan = {"caches": {"folders": FOLDERS, "key": key | stack}}
        harness.open_caches(tmp_path / name, plan)
    assert prewarm_of(Project(root), cell, tmp_path / "own").key == key
    with pytest.raises(JitCacheError, match="kind is environment"):
        prewarm_of(Project(root), cell, tmp_path / "environment")


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Project:
    """A small suite, and a receipt of its tier server."""
    project = small_project(root, tmp_path / "project")
    result = tmp_path / "server.json"
    result.write_text(json.dumps(green_run(project)))
    make_receipt(project, result, None)
    return project


def left_by(project: Project, folder: Path, *tiers: str) -> Path:
    """Caches that green runs of tiers left."""
    cell = project.cell("h200", "0.26")
    tree = read_tree_lock(project.root / cell.line.series, "0.26").result
    plan = {"caches": {"folders": FOLDERS, "key": cache_key(project, cell, tree)}}
    harness.open_caches(folder, plan)
    (folder / "triton" / "kernel.cubin").write_bytes(b"code")
    for tier in tiers:
        (folder / f"warm-{tier}").touch()
    return folder


def test_lock_names_the_image_of_the_receipt(project: Project, tmp_path: Path) -> None:
    cell, folder = project.cell("h200", "0.26"), left_by(project, tmp_path / "left", "server")
    assert prewarm_lock(project.root, cell)[1] is None
    path = lock_prewarm(project, cell, folder)
    assert path == project.root / "records" / "prewarm" / "h200--0.26.json"
    _, lock = prewarm_lock(project.root, cell)
    assert lock is not None
    assert (lock.image, lock.tiers) == (f"sha256:{IMAGE}", ("server",))
    assert (lock.sha256, lock.bytes > 4) == (prewarm_of(project, cell, folder).digest, True)


@pytest.mark.parametrize(
    ("tiers", "words"),
    [
        ((), "no tier was green with these caches"),
        (("kernel", "server"), "no receipt of tier ker"),
    ],
)
def test_kernels_of_a_run_without_receipt_are_not_locked(
    project: Project, tmp_path: Path, tiers: tuple[str, ...], words: str
) -> None:
    folder = left_by(project, tmp_path / "left", *tiers)
    with pytest.raises(JitCacheError, match=words):
        lock_prewarm(project, project.cell("h200", "0.26"), folder)
    assert not (project.root / "records" / "prewarm").exists()


def test_broken_lock_is_refused(project: Project) -> None:
    cell = project.cell("h200", "0.26")
    path, _ = prewarm_lock(project.root, cell)
    path.parent.mkdir()
    path.write_text("{}")
    with pytest.raises(RecordFileError, match="invalid prewarm lock"):
        prewarm_lock(project.root, cell)


@pytest.fixture
def prewarm(folder: Path) -> Prewarm:
    return Prewarm(folder=folder, key=KEY, digest=tree_digest(folder))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.mark.usefixtures("cache")
def test_the_layer_is_compressed_and_the_same_each_time(prewarm: Prewarm, tmp_path: Path) -> None:
    large = prewarm.folder / "triton" / "k" / "kernel.json"
    large.write_bytes(b"x" * 3_000_000)
    (prewarm.folder / "triton" / "k" / "launcher.so").touch(mode=0o755)
    prewarm = replace(prewarm, digest=tree_digest(prewarm.folder))
    stored = prewarm_layer(prewarm, 1_700_000_000)
    assert stored.blob.size < 10_000
    assert hashlib.sha256(stored.blob.path.read_bytes()).hexdigest() == stored.blob.digest
    with (
        stored.blob.path.open("rb") as packed,
        zstandard.ZstdDecompressor().stream_reader(packed) as plain,
        tarfile.open(fileobj=plain, mode="r|") as tar,
    ):
        rows = {member.name: (member.mode, member.size, member.mtime, member.uid) for member in tar}
    name = f"{BAKED}/triton/k"[1:]
    assert rows[f"{name}/kernel.json"] == (0o644, 3_000_000, 1_700_000_000, 0)
    assert rows[f"{name}/launcher.so"][0] == rows[SCRIPT[1:]][0] == 0o755
    assert rows[name][0] == 0o755
    assert list(rows)[:3] == ["opt", "opt/vllm-forge", BAKED[1:]]
    unpacked = stored.files / name
    assert (unpacked / "kernel.json").read_bytes() == large.read_bytes()
    assert (unpacked / "launcher.so").stat().st_mode & 0o777 == 0o755
    assert (stored.files / SCRIPT[1:]).stat().st_mode & 0o777 == 0o755
    first = stored.blob.digest
    shutil.rmtree(tmp_path / "store")
    assert prewarm_layer(prewarm, 1_700_000_000).blob.digest == first


@pytest.mark.usefixtures("cache")
def test_layer_gives_the_set_back(prewarm: Prewarm, tmp_path: Path) -> None:
    (prewarm.folder / "triton" / "k" / "launcher.so").touch(mode=0o755)
    prewarm = replace(prewarm, digest=tree_digest(prewarm.folder))
    unpack_prewarm(prewarm_layer(prewarm, 1_700_000_000).blob, tmp_path / "again")
    assert tree_digest(tmp_path / "again") == prewarm.digest


def test_kernels_serve_where_they_were_compiled(prewarm: Prewarm) -> None:
    """Triton's groups, vLLM's indexes and ninja's logs hold absolute paths."""
    compiled = place_of(KEY)
    assert prewarm.place == compiled
    assert prewarm.environment()["TRITON_CACHE_DIR"] == f"{compiled}/triton"
    (prewarm.folder / "triton" / "more").write_text("compiled")
    more = replace(prewarm, digest=tree_digest(prewarm.folder))
    assert more.place == compiled
    assert place_of(KEY | {"tree": "8d54"}) != compiled


def test_the_digest_is_of_the_content(folder: Path) -> None:
    before = tree_digest(folder)
    assert tree_digest(folder) == before
    (folder / "triton" / "k" / "kernel.cubin").write_bytes(b"c0de")
    assert tree_digest(folder) != before


def start(
    root: Path, baked: Path, *command: str, content: str = "c0"
) -> subprocess.CompletedProcess[str]:
    script = root / "prewarmed"
    script.write_text(ENTRYPOINT.replace(BAKED, str(baked)))
    place = {PLACE: str(root / "volume" / "jit" / "one"), CONTENT: content}
    return subprocess.run(
        ["sh", str(script), *command],
        env=os.environ | place,
        capture_output=True,
        text=True,
        check=False,
    )


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.parent.iterdir())


def test_the_first_start_fills_the_volume_and_the_next_keeps_it(
    folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "volume" / "jit" / "one"
    done = start(tmp_path, folder, "echo", "two words", "3")
    assert (done.returncode, done.stdout) == (0, "two words 3\n")
    assert (place / "triton" / "k" / "kernel.cubin").read_bytes() == b"code"
    (place / "new").write_text("compiled later")
    (place / "triton" / "k" / "kernel.cubin").write_bytes(b"compiled later")
    done = start(tmp_path, folder, "true")
    assert (done.returncode, done.stderr) == (0, "")
    assert (place / "new").exists()
    assert (place / "triton" / "k" / "kernel.cubin").read_bytes() == b"compiled later"
    assert names(place) == ["one", "one.c0"]


def test_the_command_is_not_run_without_the_kernels(tmp_path: Path) -> None:
    done = start(tmp_path, tmp_path / "missing", "echo", "served")
    assert done.returncode != 0
    assert not done.stdout
    assert list((tmp_path / "volume" / "jit").iterdir()) == []


def with_tools(tmp_path: Path, **tools: str) -> str:
    """A PATH on which these programs are scripts."""
    for name, text in tools.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    return f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"


def test_a_rename_that_fails_ends_the_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", with_tools(tmp_path, mv="exit 1"))
    done = start(tmp_path, folder, "echo", "served")
    assert done.returncode != 0
    assert not done.stdout
    assert list((tmp_path / "volume" / "jit").iterdir()) == []


def test_of_two_that_start_at_once_both_have_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one's folder appears between the look and the rename."""
    place = tmp_path / "volume" / "jit" / "one"
    other = f"mkdir -p {place} && echo theirs > {place}/caches.json"
    monkeypatch.setenv("PATH", with_tools(tmp_path, mv=f'{other} && exec /bin/mv "$@"'))
    done = start(tmp_path, folder, "echo", "served")
    assert (done.returncode, done.stdout) == (0, "served\n")
    assert (place / "caches.json").read_text() == "theirs\n"
    assert (place / "triton" / "k" / "kernel.cubin").read_bytes() == b"code"
    assert names(place) == ["one", "one.c0"]


def test_kernels_of_another_image_of_the_stack_join_those_of_the_volume(
    folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "volume" / "jit" / "one"
    assert start(tmp_path, folder, "true").returncode == 0
    (place / "triton" / "k" / "kernel.cubin").write_bytes(b"in use")
    (folder / "triton" / "two words").mkdir()
    (folder / "triton" / "two words" / "k.cubin").write_bytes(b"more")
    done = start(tmp_path, folder, "echo", "served", content="c1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "served\n", "")
    assert (place / "triton" / "two words" / "k.cubin").read_bytes() == b"more"
    assert (place / "triton" / "k" / "kernel.cubin").read_bytes() == b"in use"
    assert names(place) == ["one", "one.c0", "one.c1"]


@pytest.mark.parametrize("tool", ["ln", "find", "mkdir"])
def test_a_join_that_fails_ends_the_start_and_is_done_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    place = tmp_path / "volume" / "jit" / "one"
    place.mkdir(parents=True)
    with monkeypatch.context() as patch:
        # mkdir makes the volume's folder first, and fails below the kernels' own.
        fails = 'case "$*" in *triton*) ;; *) exec /bin/mkdir "$@";; esac; ' * (tool == "mkdir")
        fails += "echo no links here >&2; exit 1"
        patch.setenv("PATH", with_tools(tmp_path, **{tool: fails}))
        done = start(tmp_path, folder, "echo", "served")
    assert done.returncode != 0
    assert (done.stdout, "no links here" in done.stderr) == ("", True)
    assert names(place) == ["one"]
    assert start(tmp_path, folder, "true").returncode == 0
    assert (place / "triton" / "k" / "kernel.cubin").read_bytes() == b"code"


def test_a_volume_whose_kernels_were_deleted_is_filled_again(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "volume" / "jit" / "one"
    assert start(tmp_path, folder, "true").returncode == 0
    shutil.rmtree(place)
    assert start(tmp_path, folder, "true").returncode == 0
    assert (place / "triton" / "k" / "kernel.cubin").read_bytes() == b"code"
