"""Compiled kernels travel with the key of their stack, and are refused for another one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

from vllm_forge.errors import JitCacheError, KitError
from vllm_forge.gpu import caches
from vllm_forge.images.prewarm import BAKED, ENTRYPOINT, SCRIPT, VARIABLE, Prewarm, tree_digest
from vllm_forge.proof.kit_caches import PACKED, pack_caches

if TYPE_CHECKING:
    from pathlib import Path

PLAN = {
    "compute_capability": "9.0",
    "tree": "7c43",
    "lock_sha256": "10cc",
    "subject": {"kind": "image", "sha256": "d19e57"},
}
KEY = {"compute_capability": "9.0", "tree": "7c43", "kind": "image", "stack": "10cc"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Caches with one compiled kernel."""
    made = tmp_path / "caches"
    caches.open_caches(made, KEY)
    (made / "triton" / "k").mkdir()
    (made / "triton" / "k" / "kernel.cubin").write_bytes(b"code")
    return made


def test_an_image_is_keyed_by_its_lock_and_an_environment_by_its_packages() -> None:
    assert caches.stack_key(PLAN) == KEY
    here = PLAN | {"subject": {"kind": "environment", "sha256": "e417"}}
    rows = ["# Python 3.12.3", "pluggy==1", "pytest==9", "pytest-xdist==3", "torch==2 record=a"]

    def key(rows: list[str]) -> str:
        return caches.stack_key(here, "\n".join(rows) + "\n")["stack"]

    assert key(rows) == key([rows[0], rows[-1]]), "what runs tests compiles nothing"
    assert key(rows) != key([*rows[:-1], "torch==2 record=b"])
    assert key(rows) != key(["# Python 3.13.1", *rows[1:]])


def test_each_compiler_has_a_folder(folder: Path) -> None:
    found = caches.open_caches(folder, KEY)
    assert found["TRITON_CACHE_DIR"] == str(folder / "triton")
    assert set(found) == set(caches.FOLDERS.values())
    assert all((folder / name).is_dir() for name in caches.FOLDERS)
    assert caches.count_files(folder) == 1


@pytest.mark.parametrize("name", sorted(KEY))
def test_another_stack_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(JitCacheError, match=f"{name} is .*, here it is other"):
        caches.open_caches(folder, KEY | {name: "other"})


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"tree": 1}'])
def test_what_is_not_ours_is_refused(folder: Path, content: str) -> None:
    (folder / caches.KEY).write_text(content)
    with pytest.raises(JitCacheError, match="no caches of the suite"):
        caches.open_caches(folder, KEY)
    (folder / caches.KEY).unlink()
    with pytest.raises(JitCacheError):
        caches.open_caches(folder, KEY)


def packed(folder: Path, target: Path) -> Path:
    with tarfile.open(target, "w:xz") as tar:
        tar.add(folder, arcname="caches")
    return target


@pytest.mark.parametrize("form", ["folder", "tar", "pieces"])
def test_a_kit_takes_what_a_run_left(folder: Path, tmp_path: Path, form: str) -> None:
    source = folder
    if form != "folder":
        source = packed(folder, tmp_path / "caches.tar.xz")
    if form == "pieces":
        content = source.read_bytes()
        source.unlink()
        for number in range(2):
            half = len(content) // 2
            piece = content[:half] if number == 0 else content[half:]
            (tmp_path / f"caches.tar.xz.{number:02}").write_bytes(piece)
    content = tmp_path / "kit"
    content.mkdir()
    pack_caches(source, content, KEY)
    with tarfile.open(content / PACKED, "r:xz") as tar:
        tar.extractall(tmp_path / "host", filter="data")
    target = tmp_path / "host" / "caches"
    assert (target / "triton" / "k" / "kernel.cubin").read_bytes() == b"code"
    assert json.loads((target / caches.KEY).read_text()) == KEY


def test_a_kit_refuses_other_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KitError, match="no such caches"):
        pack_caches(tmp_path / "nothing", tmp_path, KEY)
    (tmp_path / "text").write_text("text")
    with pytest.raises(KitError, match="not the caches of a run"):
        pack_caches(tmp_path / "text", tmp_path, KEY)
    (folder / "strange").mkdir()
    with pytest.raises(KitError, match="strange"):
        pack_caches(folder, tmp_path, KEY)
    assert not (tmp_path / PACKED).exists()


def test_a_kit_refuses_caches_of_another_stack(folder: Path, tmp_path: Path) -> None:
    """Not on the host only, where they are when the GPU's minutes run."""
    with pytest.raises(JitCacheError, match="tree is 7c43, here it is 8d54"):
        pack_caches(folder, tmp_path, {"tree": "8d54"})
    assert not (tmp_path / PACKED).exists()


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_kit_refuses_a_part_of_a_tar(folder: Path, tmp_path: Path, keep: float) -> None:
    (folder / "triton" / "large").write_bytes(random.Random(0).randbytes(200_000))  # noqa: S311
    packed = tmp_path / "caches.tar.xz"
    with tarfile.open(packed, "w:xz") as tar:
        tar.add(folder, arcname="caches")
    whole = packed.read_bytes()
    middle = int(len(whole) * keep)
    for damaged in (whole[:middle], whole[:middle] + b"damaged" + whole[middle + 7 :]):
        packed.write_bytes(damaged)
        (tmp_path / "content").mkdir(exist_ok=True)
        with pytest.raises(KitError, match="not the caches of a run"):
            pack_caches(packed, tmp_path / "content", KEY)


@pytest.mark.parametrize("name", ["../outside", "/outside"])
def test_a_tar_does_not_write_elsewhere(tmp_path: Path, name: str) -> None:
    packed = tmp_path / "caches.tar.xz"
    with tarfile.open(packed, "w:xz") as tar:
        tar.addfile(tarfile.TarInfo(name))
    (tmp_path / "content").mkdir()
    with pytest.raises(KitError):
        pack_caches(packed, tmp_path / "content", KEY)
    assert not (tmp_path / "outside").exists()


@pytest.fixture
def prewarm(folder: Path) -> Prewarm:
    return Prewarm(
        folder=folder,
        variables={variable: name for name, variable in caches.FOLDERS.items()},
        key=KEY,
        digest=tree_digest(folder),
    )


def test_entries_of_the_layer(prewarm: Prewarm) -> None:
    entries = {entry.path: entry for entry in prewarm.entries()}
    assert list(entries) == sorted(entries)
    assert entries[f"{BAKED}/triton/k/kernel.cubin"[1:]].content == b"code"
    assert entries[SCRIPT[1:]].mode == 0o755
    assert prewarm.environment()["TRITON_CACHE_DIR"] == f"{prewarm.place}/triton"


def test_the_digest_is_of_the_content(folder: Path) -> None:
    before = tree_digest(folder)
    assert tree_digest(folder) == before
    (folder / "triton" / "k" / "kernel.cubin").write_bytes(b"c0de")
    assert tree_digest(folder) != before


def start(root: Path, baked: Path, *command: str) -> subprocess.CompletedProcess[str]:
    script = root / "prewarmed"
    script.write_text(ENTRYPOINT.replace(BAKED, str(baked)))
    return subprocess.run(
        ["sh", str(script), *command],
        env={**os.environ, VARIABLE: str(root / "volume" / "jit" / "one")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_first_start_fills_the_volume_and_the_next_keeps_it(
    folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "volume" / "jit" / "one"
    done = start(tmp_path, folder, "echo", "two words", "3")
    assert (done.returncode, done.stdout) == (0, "two words 3\n")
    assert (place / "triton" / "k" / "kernel.cubin").read_bytes() == b"code"
    (place / "new").write_text("compiled later")
    assert start(tmp_path, folder, "true").returncode == 0
    assert (place / "new").exists()
    assert [path.name for path in place.parent.iterdir()] == ["one"]


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


def test_of_two_that_start_at_once_the_second_takes_the_firsts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one's folder appears while this one copies."""
    place = tmp_path / "volume" / "jit" / "one"
    other = f"mkdir -p {place} && touch {place}/theirs"
    monkeypatch.setenv("PATH", with_tools(tmp_path, cp=f'{other} && exec /bin/cp "$@"'))
    done = start(tmp_path, folder, "echo", "served")
    assert (done.returncode, done.stdout) == (0, "served\n")
    assert [path.name for path in place.iterdir()] == ["theirs"]
    assert [path.name for path in place.parent.iterdir()] == ["one"]
