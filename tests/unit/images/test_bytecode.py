"""Python's bytecode: on the volume, of each image apart; or in the image that carries kernels."""

from __future__ import annotations

import _imp
import io
import json
import marshal
import os
import subprocess
import sys
import tarfile
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_forge.host import RecordingRunner
from vllm_forge.images import bytecode, compile_sources
from vllm_forge.images.build import bytecode_place
from vllm_forge.images.bytecode import (
    COMPILER,
    bytecode_key,
    bytecode_layer,
    bytecode_problems,
    kept_bytecode,
)
from vllm_forge.images.engines import BYTECODE, Buildah, Buildx, ContainerRun, _runtime_config
from vllm_forge.images.errors import ForeignFileError
from vllm_forge.images.layer import LayerBlob, members
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


def test_image_with_bytecode_of_its_own_is_run_as_it_is(tmp_path: Path) -> None:
    """Else its checks would find other bytecode than a server; what compiles has a place."""
    run = ContainerRun(
        layout=tmp_path, config={"User": "10001:0", "Env": ["A=1"]}, name="x", lower_dirs=(),
        inputs=tmp_path, argv=("x",), work=tmp_path, bytecode=None, output=tmp_path / "output",
    )  # fmt: skip
    made = _runtime_config(run)
    assert made["process"]["env"] == ["A=1"]
    writable = {
        row["destination"]: row["source"] for row in made["mounts"] if "rw" in row["options"]
    }
    assert writable == {"/media": str(tmp_path / "output")}
    runner = RecordingRunner()
    Buildx().run_in_image(runner, run)
    assert f"--volume={tmp_path}/output:/media" in runner.commands[-1]


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
    assert {folder.parent.name for folder in folders if folder} == {"bytecode"}


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


SOURCES = {
    "package/__init__.py": "KINDS = {'a', 'b', 'c', 'd'} | {1.5, 2.5}\n",
    "package/part.py": "def f(x, *, y=(1, 'two')):\n    return x in {'e', 'f', 'g'} or y\n",
    "package/template.py": "{% not Python %}\n",
    "package/zeros.py": "x = 1\0\n",
    "package/warns.py": "x = 1 is 1\n",
}
EPOCH = 1735689600
TAG = f"{sys.version_info.major}{sys.version_info.minor}"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
CHECKED, UNCHECKED = (number.to_bytes(4, "little") for number in (3, 1))


def write_sources(folder: Path) -> Path:
    for name, text in SOURCES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "package" / "link.py").symlink_to("part.py")
    return folder


def compiled(site: Path, output: Path, seed: str = "0") -> Path:
    """The tar that the script writes of ``site``; by another hash seed, sets have another order."""
    output.mkdir()
    text = COMPILER.read_text()
    script = output / "script.py"
    script.write_text(text.replace('Path("/media")', f"Path({str(output)!r})"))
    assert script.read_text() != text
    argv = [sys.executable, "-S", str(script), str(site)]
    done = subprocess.run(
        argv, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""  # of one source, Python warns
    return output / compile_sources.NAME


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / "cache"))
    return write_sources(tmp_path / "site")


def test_compiled_sources_are_the_same_each_time(site: Path, tmp_path: Path) -> None:
    first, second = (compiled(site, tmp_path / seed, seed) for seed in ("1", "2"))
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as tar:
        names = [Path(name).name for name in tar.getnames()]
    assert names == [f"{name}.cpython-{TAG}.pyc" for name in ("__init__", "part", "warns")]


def test_python_takes_baked_bytecode_of_its_source_only(site: Path, tmp_path: Path) -> None:
    """Without a variable, from a folder where it cannot write, and whatever the files' times."""
    tar = compiled(site, tmp_path / "output")
    layer = bytecode_layer("key", tar, EPOCH)
    (part,) = layer.files.rglob("part.*.pyc")
    other = compile("VALUE = 'baked'", "part.py", "exec", dont_inherit=True)
    cache = site / "package" / "__pycache__"
    cache.mkdir()
    baked = cache / part.name
    baked.write_bytes(part.read_bytes()[:16] + marshal.dumps(other))

    def imported() -> str:
        code = "import package.part as p; print(getattr(p, 'VALUE', 'source'))"
        done = subprocess.run(
            [sys.executable, "-S", "-c", code], cwd=site, env={"PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    os.utime(site / "package" / "part.py", (0, 0))
    assert imported() == "baked"
    (site / "package" / "part.py").write_text(SOURCES["package/part.py"].replace("two", "six"))
    assert imported() == "source"


def test_layer_of_bytecode_is_the_same_each_time(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar, digests = compiled(site, tmp_path / "output"), set()
    for cache in ("one", "two"):
        monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / cache))
        blob = bytecode_layer("key", tar, EPOCH).blob
        digests.add(blob.digest)
        rows = {f"/{name}": info for name, info, _ in members(blob) if info.isreg()}
        assert {(info.mode, info.uid, info.mtime) for info in rows.values()} == {(0o644, 0, EPOCH)}
        assert list(rows) == sorted(rows)
        assert len(rows) == 3
    assert len(digests) == 1


@pytest.mark.parametrize(
    "name",
    ["opt/evil.py", "opt/../__pycache__/x.cpython-313.pyc/y", "opt/__pycache__/x.pyc", "link"],
)
def test_tar_with_other_files_is_refused(site: Path, tmp_path: Path, name: str) -> None:
    tar = tmp_path / "bytecode.tar"
    with tarfile.open(tar, "w") as made:
        info = tarfile.TarInfo("opt/__pycache__/x.cpython-313.pyc" if name == "link" else name)
        info.type = tarfile.SYMTYPE if name == "link" else tarfile.REGTYPE
        made.addfile(info, io.BytesIO())
    with pytest.raises(ForeignFileError, match="is not a file of bytecode"):
        bytecode_layer(f"key of {name[:3]}", tar, EPOCH)


def test_tar_with_too_many_bytes_is_refused(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bytecode, "MOST", 1000)
    with pytest.raises(ForeignFileError, match="are taken"):
        bytecode_layer("key", compiled(site, tmp_path / "output"), EPOCH)


def test_key_depends_on_each_layer_and_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [bytecode_key([layer(name)], EPOCH) for name in ("a", "b", "a")]
    assert keys[0] == keys[2] != keys[1]
    monkeypatch.setattr(bytecode, "COMPILER", tmp_path / "other.py")
    (tmp_path / "other.py").write_text("")
    assert bytecode_key([layer("a")], EPOCH) != keys[0]


def pyc(source: bytes, flags: bytes = CHECKED) -> bytes:
    magic = MAGIC_NUMBER
    return bytes(
        magic + flags + _imp.source_hash(int.from_bytes(magic, "little"), source) + b"code"
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m", pyc(b"x = 1"), ""),
        ("m", pyc(b"x = 2"), "not of its source"),
        ("m", pyc(b"x = 1", UNCHECKED), "not of its source"),
        ("m", b"", "not of its source"),
        ("n", pyc(b"x = 1"), "no source"),
    ],
    ids=["good", "other", "unchecked", "empty", "no-source"],
)
def test_bytecode_must_be_of_its_source(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / "m.py").write_bytes(b"x = 1")
    file = tmp_path / "m.pyc"
    file.write_bytes(content)
    paths = {f"a/__pycache__/{name}.cpython-{TAG}.pyc": file}
    problems = bytecode_problems(paths, PYTHON, {"a/m.py": tmp_path / "m.py"}, [])
    assert problems == ([f"{words}: /{min(paths)}"] if words else [])


@pytest.mark.parametrize("path", ["a/m.pyc", "a/__pycache__/m.cpython-27.pyc", "a/x.py"])
def test_bytecode_of_another_place_is_red(tmp_path: Path, path: str) -> None:
    (problem,) = bytecode_problems({path: tmp_path}, PYTHON, {}, [])
    assert problem == f"not bytecode of Python {PYTHON}: /{path}"
