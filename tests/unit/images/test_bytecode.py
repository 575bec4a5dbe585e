"""Python's bytecode is kept on the volume, of each image apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_forge.images.build import bytecode_place
from vllm_forge.images.bytecode import kept_bytecode
from vllm_forge.images.engines import BYTECODE, Buildah, ContainerRun, _runtime_config
from vllm_forge.images.layer import LayerBlob
from vllm_forge.images.layout import ImageLayer
from vllm_forge.images.plan import BuildOptions, resolve
from vllm_forge.project import Project

if TYPE_CHECKING:
    from collections.abc import Callable


def layer(diff_id: str) -> ImageLayer:
    blob = LayerBlob(path=Path(), digest="d", diff_id=diff_id, size=1)
    return ImageLayer(blob=blob, name="x")


def test_bytecode_folder_depends_on_all_layers() -> None:
    first = bytecode_place([layer("a"), layer("b")])
    assert first == bytecode_place([layer("a"), layer("b")])
    assert first.startswith("/cache/python/")
    others = [[layer("a")], [layer("a"), layer("c")], [layer("b"), layer("a")], [layer("ab")]]
    assert len({first, *map(bytecode_place, others)}) == 5


def test_python_reuses_bytecode_of_equal_size_and_time(tmp_path: Path) -> None:
    """Why each image has a folder of its own: Python's check would let a volume serve old code."""
    source, said = tmp_path / "module.py", []
    for text in ("print('old')", "print('new')"):
        source.write_text(text)
        os.utime(source, (1735689600, 1735689600))
        done = subprocess.run(
            [sys.executable, "-c", "import module"],
            cwd=tmp_path,
            env={BYTECODE: str(tmp_path / "volume"), "PYTHONDONTWRITEBYTECODE": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(done.stdout.strip())
    assert said == ["old", "old"]


def test_checks_use_a_bytecode_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that is there twice is the first one's for C, the last one's for Python."""
    monkeypatch.setattr("os.chown", lambda *_: None)
    config = {"User": "10001:10001", "Env": ["A=1", f"{BYTECODE}=/cache/python/0", "B=2"]}
    run = ContainerRun(
        layout=tmp_path, config=config, name="x", lower_dirs=(), inputs=tmp_path, argv=("x",),
        work=tmp_path, bytecode=tmp_path / "bytecode",
    )  # fmt: skip
    made: dict[str, Any] = json.loads(json.dumps(_runtime_config(run)))
    assert made["process"]["env"] == ["A=1", "B=2", f"{BYTECODE}=/srv"]


def test_bytecode_of_checks_is_closed_to_users_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner is the image's user, whose number a user of the host may have, too."""
    monkeypatch.setattr("os.chown", lambda *_: None)
    folder = tmp_path / "bytecode"
    folder.mkdir(mode=0o755)
    run = ContainerRun(
        layout=tmp_path, config={"User": "10001:0", "Env": []}, name="x", lower_dirs=(),
        inputs=tmp_path, argv=("x",), work=tmp_path, bytecode=folder / "key",
    )  # fmt: skip
    _runtime_config(run)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_checks_of_other_packages_have_another_bytecode_folder(
    tmp_path: Path, checkout: Path
) -> None:
    """Code of one image must not write what Python runs in another one."""
    project = Project(checkout)
    runs = [
        run
        for sku, line in (("b300", "0.22"), ("b300", "0.26"), ("h200", "0.26"), ("h200", "0.33"))
        for run in resolve(
            project, project.cell(sku, line), BuildOptions(output=tmp_path), Buildah()
        ).checks_inside()
    ]
    folders = [run.bytecode for run in runs]
    assert len(set(folders)) == 3  # the SKUs of a line have the same Python files
    assert folders[2] == folders[4]
    assert all(folder.parent.name == "bytecode" for folder in folders)


def run_once(folder: Path) -> bool:
    """Use a folder as runs do; whether it had the bytecode of an earlier one."""
    with kept_bytecode(folder):
        path = folder / "site" / "module.pyc"
        known = path.is_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"bytecode")
        os.utime(path, (1, 1))  # in which the clock's tick, for a file system, does not show
    return known


def test_bytecode_is_used_again_as_it_was_left(tmp_path: Path) -> None:
    assert [run_once(tmp_path / "x") for _ in range(3)] == [False, True, True]


CHANGES: dict[str, Callable[[Path], object]] = {
    "byte": lambda folder: (folder / "site/module.pyc").write_bytes(b"bytecodf"),
    "more": lambda folder: (folder / "site/other.pyc").write_bytes(b""),
    "link": lambda folder: (folder / "site/other.pyc").symlink_to("module.pyc"),
    "fifo": lambda folder: os.mkfifo(folder / "site/other.pyc"),
    "no seal": lambda folder: folder.with_name("x.json").unlink(),
    "seal": lambda folder: folder.with_name("x.json").write_text('{"files": ""}'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_bytecode_is_not_run(change: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    run_once(folder)
    CHANGES[change](folder)
    assert [run_once(folder), run_once(folder)] == [False, True]


def test_bytecode_of_a_killed_run_is_not_run(tmp_path: Path) -> None:
    """Nothing says that it is whole."""
    folder = tmp_path / "x"
    run_once(folder)
    (folder / "half.pyc").write_bytes(b"")
    assert not run_once(folder)
    assert not (folder / "half.pyc").exists()


def test_fifo_that_a_run_leaves_does_not_hold_the_next_one(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    with kept_bytecode(folder):
        folder.mkdir()
        os.mkfifo(folder / "module.pyc")
    assert not run_once(folder)


def test_unused_bytecode_leaves_no_record(tmp_path: Path) -> None:
    """As with an engine that keeps none."""
    with kept_bytecode(tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == []
