"""Kits: what travels, what is zeroed, and that parts come together again or are refused."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from tests.support.wheels import Member, write_wheel
from vllm_forge.errors import UsageError
from vllm_forge.gputest import kit_host
from vllm_forge.gputest.errors import KitError
from vllm_forge.gputest.kit import HOST, RUN, parse_size, require_race, write_parts
from vllm_forge.gputest.wheels import (
    WheelSelection,
    read_freeze,
    require_closed,
    select_wheels,
    thin_wheel,
)
from vllm_forge.sources.index import Index, IndexFile
from vllm_forge.sources.lock import Lock, LockedWheel
from vllm_forge.sources.wheel_format import record_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from vllm_forge.matrix import Matrix


LIMITS = {"minutes": 1, "limit": 580, "max_result": 15 << 20}


Choose: TypeAlias = "Callable[..., WheelSelection]"
Make: TypeAlias = "Callable[..., None]"


def wheel(name: str, version: str, tag: str = "py3-none-any") -> LockedWheel:
    return LockedWheel(
        name=name, version=version, filename=f"{name}-{version}-{tag}.whl", size=1, sha256="0" * 64
    )


class OneIndex(Index):
    """Offers the Python 3.12 file of every release."""

    def files_of(self, names: Iterable[str]) -> dict[str, list[IndexFile]]:
        return {
            name: [
                IndexFile(
                    filename=f"{name}-{self.versions[name]}-{tag}.whl",
                    url="",
                    sha256="1" * 64,
                    size=2,
                )
                for tag in ("cp311-cp311-linux_x86_64", "cp312-cp312-manylinux_2_28_x86_64")
            ]
            for name in names
        }

    def __init__(self, **versions: str) -> None:
        self.versions = versions


LOCK = (
    wheel("aiohttp", "3.14.5", "cp313-cp313-manylinux_2_28_x86_64"),
    wheel("click", "8.5.1"),
    wheel("numpy", "2.4.6", "cp313-cp313-manylinux_2_28_x86_64"),
    wheel("tilelang", "0.1.9", "cp38-abi3-manylinux_2_28_x86_64"),
    wheel("torch", "2.11.0", "cp313-cp313-manylinux_2_28_x86_64"),
    wheel("vllm", "0.26.0", "cp38-abi3-manylinux_2_28_x86_64"),
)


@pytest.fixture
def chosen(root: Path, tmp_path: Path) -> Choose:
    from vllm_forge.matrix import load

    matrix: Matrix = load(root)

    def call(frozen: dict[str, str], *omit: str) -> WheelSelection:
        return select_wheels(
            matrix.line["0.26"].model_copy(update={"python": "3.12"}),
            matrix.base,
            Lock(path=tmp_path, wheels=LOCK, digest=""),
            OneIndex(aiohttp="3.14.5", numpy="2.4.6"),
            frozen=frozen,
            omit=omit,
            extra=[wheel("pytest", "9.2.0")],
        )

    return call


def test_only_what_the_host_lacks_travels(chosen: Choose) -> None:
    found = chosen({"torch": "2.11.0+cu130", "numpy": "2.4.6", "click": "8.0"})
    names = {item.name: item for item in found.wheels}
    assert set(names) == {"aiohttp", "click", "pytest", "tilelang"}
    assert found.kept == ("numpy", "torch")
    assert names["click"].sha256 == names["tilelang"].sha256 == "0" * 64
    assert "cp312" in names["aiohttp"].filename


def test_other_files_than_the_locks_are_named(chosen: Choose) -> None:
    (difference,) = chosen({"torch": "2.11.0"}).differences
    assert "2 wheels are other files" in difference
    assert "aiohttp, numpy" in difference


def test_omitted_wheel_is_a_difference(chosen: Choose) -> None:
    found = chosen({"torch": "2.11.0", "aiohttp": "3.14.5", "numpy": "2.4.6"}, "tilelang")
    assert found.differences == ("tilelang is left out",)
    assert {item.name for item in found.wheels} == {"click", "pytest"}
    with pytest.raises(KitError, match="unknown --omit tilelong"):
        chosen({"torch": "2.11.0"}, "tilelong")


def test_another_torch_is_refused(chosen: Choose) -> None:
    with pytest.raises(KitError, match=r"torch 2\.14\.0, the line needs 2\.11\.0"):
        chosen({"torch": "2.14.0+cu130"})


def test_freeze_of_another_python_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "freeze.txt"
    path.write_text("packaging==26.3\nsetuptools==80.10.2\nuv==0.11.15\nwheel==0.46.2\n")
    with pytest.raises(KitError, match="missing torch"):
        read_freeze(path)


def test_freeze(tmp_path: Path) -> None:
    path = tmp_path / "freeze.txt"
    path.write_text("# x\nTorch==2.11.0+cu130\nfoo_bar @ file:///x\n-e git+x\nPy.Yaml==6\n\n")
    assert read_freeze(path) == {"torch": "2.11.0+cu130", "py-yaml": "6"}
    path.write_text("torch>=2\n")
    with pytest.raises(KitError, match="not a line of pip freeze"):
        read_freeze(path)


def test_a_freeze_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "freeze.txt"
    with pytest.raises(KitError, match="cannot read --freeze"):
        read_freeze(path)
    path.write_bytes(b"torch==2\xff\n")
    with pytest.raises(KitError, match="cannot read --freeze"):
        read_freeze(path)


def make_wheel(path: Path, files: dict[str, bytes], *requires: str) -> Path:
    members = [Member(path=file, content=data) for file, data in files.items()]
    return write_wheel(path, path.name.partition("-")[0], "1", members, requires=requires)


@pytest.mark.parametrize(
    ("requires", "closed"),
    [
        ("nothing-has-it", False),
        ("the-host_has.it>=1", True),
        ('backport; python_version < "3.13"', False),
        ('backport; python_version < "3.12"', True),
        ('more; extra == "more"', True),
        ('pywin; sys_platform == "win32"', True),
        ("A", True),
    ],
)
def test_requirements_are_all_met(tmp_path: Path, requires: str, closed: bool) -> None:
    path = make_wheel(tmp_path / "a-1-py3-none-any.whl", {}, requires)
    if closed:
        require_closed([path], {"the-host-has-it"}, "3.12")
    else:
        with pytest.raises(KitError, match="needs"):
            require_closed([path], {"the-host-has-it"}, "3.12")


def test_a_wheel_is_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code for 9.0 stays, code for 10.0 goes; a library that no test uses goes whole."""
    from types import SimpleNamespace

    from vllm_forge.gputest import wheels as kit_wheels
    from vllm_forge.kernels.coverage import Target

    rows = [
        SimpleNamespace(target=Target.parse("sm_90a"), kind="cubin", offset=0, size=4),
        SimpleNamespace(target=Target.parse("sm_100a"), kind="cubin", offset=4, size=4),
        SimpleNamespace(target=Target.parse("compute_80"), kind="ptx", offset=8, size=4),
    ]
    monkeypatch.setattr(kit_wheels, "device_code", lambda *_: rows)
    content = b"AAAABBBBCCCCrest"
    source = make_wheel(
        tmp_path / "vllm-1-py3-none-any.whl",
        {"vllm/_C.so": content, "vllm/fa/_fa.so": content, "vllm/a.py": b"x"},
    )
    target = tmp_path / "out" / source.name
    found = thin_wheel(source, target, (9, 0), ["vllm/fa/*.so"])
    with zipfile.ZipFile(target) as archive:
        assert archive.read("vllm/_C.so") == b"AAAA\0\0\0\0CCCCrest"
        assert archive.read("vllm/fa/_fa.so") == bytes(12) + b"rest"
        assert archive.read("vllm/a.py") == b"x"
        record = archive.read("vllm-1.dist-info/RECORD").decode().splitlines()
    assert f"vllm/_C.so,{','.join(record_row(b'AAAA' + bytes(4) + b'CCCCrest'))}" in record
    assert found.zeroed == 4 + 12
    assert "vllm/fa/_fa.so" in found.differences[1]


@pytest.mark.parametrize(("text", "size"), [("62MB", 62_000_000), ("1GiB", 1 << 30)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["62", "0MB", "-1MB", "62 XB", ""])
def test_invalid_size_is_rejected(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_incomplete_helpers_of_the_race_suite_are_refused(tmp_path: Path) -> None:
    (tmp_path / "kit.tar.xz").write_bytes(b"packed")
    with pytest.raises(KitError, match=r"missing manifest\.json"):
        require_race(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    require_race(tmp_path)


@pytest.fixture
def make(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """``make_kit`` of no wheels, which ends where it would begin with vLLM's."""
    from types import SimpleNamespace

    from vllm_forge.gputest import kit as module
    from vllm_forge.project import Project

    wheel = tmp_path / "vllm.whl"
    wheel.write_text("")
    nothing = SimpleNamespace(wheels=(), kept=(), differences=())
    lock = SimpleNamespace(find=lambda name: None)
    monkeypatch.setattr(Project, "lock", lambda *_: lock)
    monkeypatch.setattr(module, "select_wheels", lambda *_, **__: nothing)
    monkeypatch.setattr(module, "Wheelhouse", lambda: SimpleNamespace(fetch=lambda _: None))
    monkeypatch.setattr(module, "SourceRepo", lambda: None)
    monkeypatch.setattr(module, "check_line", lambda *_: None)
    monkeypatch.setattr(module, "patched_wheel", lambda *_: SimpleNamespace(path=wheel))
    freeze = tmp_path / "freeze.txt"
    freeze.write_text("torch==2.11.0\n")

    def call(begin: Callable[..., None], **changes: Any) -> None:
        monkeypatch.setattr(module, "thin_wheel", begin)
        options = module.KitOptions(
            output=tmp_path / "out" / "kit", freeze=freeze, python="3.12", max_part=1,
            max_result=1, limit=580, minutes=1,
        )  # fmt: skip
        project = Project(root)
        module.make_kit(
            project, project.cell("h200", "0.26"), dataclasses.replace(options, **changes)
        )

    return call


def test_what_a_killed_kit_leaves_goes_with_the_next_one(make: Make, tmp_path: Path) -> None:
    """Gigabytes of wheels, beside the kit."""

    def killed(*_: object) -> None:
        shutil.copytree(tmp_path / "out", tmp_path / "left", dirs_exist_ok=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(killed)
    assert list((tmp_path / "out").iterdir()) == []
    shutil.copytree(tmp_path / "left", tmp_path / "out", dirs_exist_ok=True)
    before = set((tmp_path / "out").iterdir())
    assert before
    with pytest.raises(KeyboardInterrupt):
        make(killed)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("what", ["race", "caches"])
def test_what_is_to_travel_is_looked_for_first(make: Make, tmp_path: Path, what: str) -> None:
    def begun(*_: object) -> None:
        pytest.fail("wheels were packed")

    with pytest.raises(KitError, match=r"missing|not found"):
        make(begun, **{what: tmp_path / "nothing"})


def test_dangling_link_as_kit_output_is_rejected(make: Make, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(KitError, match="--output exists"):
        make(lambda *_: None, output=tmp_path / "link")


@pytest.mark.parametrize(
    "arguments",
    [["--minutes", "nan"], ["--minutes=-1"], ["--minutes", "0"], ["--minutes", "inf"]],
)
def test_invalid_minutes_are_rejected(arguments: list[str]) -> None:
    from vllm_forge.cli import main

    assert main(["gpu", "kit", "--sku", "h200", "--output", "x", "--freeze", "x", *arguments]) == 2
    assert main(["gpu", "test", "--sku", "h200", *arguments]) == 2


@pytest.mark.parametrize("version", ["foo", "3", "3.12.1", "2.7", ""])
def test_invalid_python_is_rejected(version: str) -> None:
    from vllm_forge.cli import main

    given = ["--sku", "h200", "--output", "x", "--freeze", "x", f"--python={version}"]
    assert main(["gpu", "kit", *given]) == 2


@pytest.mark.parametrize("workers", ["0", "-1", "two", "1.5", "--lf", ""])
def test_invalid_workers_are_rejected(workers: str) -> None:
    from vllm_forge.cli import main

    assert main(["gpu", "test", "--sku", "h200", f"-n{workers}"]) == 2


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A kit of several parts whose one wheel brings a module, a script and a path file."""
    content = tmp_path / "content"
    (content / "wheels").mkdir(parents=True)
    make_wheel(
        content / "wheels" / "tiny-1-py3-none-any.whl",
        {
            "tiny/__init__.py": b"value = 7\n" + b"#" * 5000,
            "tiny-1.data/scripts/tiny-tool": b"#!python\nimport tiny; print(tiny.value)\n",
            "tiny-1.data/purelib/more.py": b"",
        },
    )
    (content / "bundle" / "src").mkdir(parents=True)
    (content / "bundle" / "note.txt").write_text("x" * 9000)
    folder = tmp_path / "kit"
    folder.mkdir()
    parts = write_parts(content, folder, 4000)
    (folder / "manifest.json").write_text(json.dumps({"parts": parts, **LIMITS}))
    (folder / "run.sh").write_text(RUN)
    shutil.copyfile(HOST, folder / "kit.py")
    return folder


def call(
    folder: Path, work: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(folder / "run.sh"), *arguments],
        env={**os.environ, "FORGE_KIT_WORK": str(work), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_limit_is_the_kits_unless_the_host_names_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FORGE_KIT_LIMIT", raising=False)
    assert kit_host.read_limit({"limit": 3000}) == 3000
    monkeypatch.setenv("FORGE_KIT_LIMIT", "100")
    assert kit_host.read_limit({"limit": 3000}) == 100


def test_parts_respect_the_limit_and_are_hashed(kit: Path) -> None:
    parts = json.loads((kit / "manifest.json").read_text())["parts"]
    assert len(parts) > 3
    for part in parts:
        data = (kit / part["name"]).read_bytes()
        assert len(data) == part["size"] <= 4000
        assert hashlib.sha256(data).hexdigest() == part["sha256"]


def test_parts_may_come_one_by_one(kit: Path, tmp_path: Path) -> None:
    """As where each call to a host carries one part: all that is kept is the work folder."""
    work, call_folder = tmp_path / "work", tmp_path / "call"
    parts = sorted(kit.glob("part-*"))
    for number, part in enumerate(parts, 1):
        shutil.rmtree(call_folder, ignore_errors=True)
        call_folder.mkdir()
        for name in ("kit.py", "run.sh", "manifest.json", part.name):
            shutil.copyfile(kit / name, call_folder / name)
        assert f"{number} of {len(parts)}" in call(call_folder, work, "take").stdout
    call(call_folder, work, "go", str(tmp_path / "out"))
    assert (work / "content" / "bundle" / "note.txt").read_text() == "x" * 9000
    tool = subprocess.run([str(work / "venv/bin/tiny-tool")], capture_output=True, check=True)
    assert tool.stdout == b"7\n"


def test_a_part_that_lacks_is_named(kit: Path, tmp_path: Path) -> None:
    (kit / "part-001").unlink()
    done = call(kit, tmp_path / "work", "go", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "missing part-001" in done.stderr


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: bytes([d[0] ^ 1]) + d[1:]])
def test_a_part_that_was_damaged_is_refused(
    kit: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    part = kit / "part-001"
    part.write_bytes(damage(part.read_bytes()))
    done = call(kit, tmp_path / "work", "take")
    assert done.returncode == 1
    assert "part-001 does not match" in done.stderr
    assert not (tmp_path / "work" / "part-001").exists()


def test_the_kits_packages_stand_before_the_hosts(kit: Path, tmp_path: Path) -> None:
    call(kit, tmp_path / "work", "go", str(tmp_path / "out"))
    python = tmp_path / "work" / "venv" / "bin" / "python"
    said = subprocess.run(
        [str(python), "-c", "import sys, tiny; print(tiny.__file__); print(*sys.path)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(tmp_path / "work" / "venv") in said.splitlines()[0]
    host = subprocess.run(
        ["python3", "-c", "import site; print(site.getsitepackages()[0])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    paths = said.splitlines()[1].split()
    assert paths.index(host) > next(i for i, p in enumerate(paths) if "work/venv" in p)


def test_what_is_installed_is_older_than_any_cache(kit: Path, tmp_path: Path) -> None:
    """Ninja builds again what is older than its sources; and no process compiles Python again."""
    work = tmp_path / "work"
    call(kit, work, "go", str(tmp_path / "out"))
    (package,) = (work / "venv/lib").glob("python*/site-packages/tiny")
    assert {path.stat().st_mtime for path in package.glob("*.py")} == {kit_host.INSTALLED}
    assert list((package / "__pycache__").glob("__init__.*.pyc"))


def test_results_of_an_earlier_call_do_not_come_back(kit: Path, tmp_path: Path) -> None:
    old = tmp_path / "work" / "results" / "kernel.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    call(kit, tmp_path / "work", "go", str(tmp_path / "out"))
    assert (tmp_path / "work" / "venv" / ".complete").exists()
    assert not old.exists()
    assert not (tmp_path / "out" / old.name).exists()


def test_results_that_cannot_be_deleted_end_the_call(kit: Path, tmp_path: Path) -> None:
    results = tmp_path / "work" / "results"
    results.parent.mkdir()
    results.write_text("not a folder")
    done = call(kit, tmp_path / "work", "go", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "NotADirectoryError" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def another_kit(kit: Path, folder: Path, note: str) -> Path:
    """One with other content, and parts of the same names."""
    content = folder.with_name("other-content")
    (content / "wheels").mkdir(parents=True)
    make_wheel(content / "wheels" / "tiny-1-py3-none-any.whl", {"tiny/__init__.py": b"value = 8\n"})
    (content / "bundle" / "src").mkdir(parents=True)
    (content / "bundle" / "note.txt").write_text(note)
    folder.mkdir()
    for name in ("kit.py", "run.sh"):
        shutil.copyfile(kit / name, folder / name)
    parts = write_parts(content, folder, 4000)
    (folder / "manifest.json").write_text(json.dumps({"parts": parts, **LIMITS}))
    return folder


def test_what_another_kit_left_is_not_run(kit: Path, tmp_path: Path) -> None:
    """Both work in the same folder, unless they are told otherwise."""
    work = tmp_path / "work"
    call(kit, work, "go", str(tmp_path / "out"))
    other = another_kit(kit, tmp_path / "other", "newer")
    call(other, work, "go", str(tmp_path / "out"))
    assert (work / "content" / "bundle" / "note.txt").read_text() == "newer"
    python = work / "venv" / "bin" / "python"
    said = subprocess.run(
        [str(python), "-c", "import tiny; print(tiny.value)"], capture_output=True, check=True
    )
    assert said.stdout == b"8\n"


def test_parts_of_another_kit_are_not_counted(kit: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    call(kit, work, "take")
    other = another_kit(kit, tmp_path / "other", "newer")
    for part in other.glob("part-*"):
        part.unlink()
    assert call(other, work, "take").stdout.startswith("0 of ")


def test_a_damaged_copy_does_not_replace_a_good_part(kit: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    call(kit, work, "take")
    good = (kit / "part-001").read_bytes()
    (kit / "part-001").write_bytes(b"damaged")
    assert call(kit, work, "take").returncode == 1
    assert (work / "part-001").read_bytes() == good


@pytest.mark.parametrize("limit", ["soon", "nan", "-5", "0", "inf", "45", ""])
def test_invalid_limit_is_rejected(kit: Path, tmp_path: Path, limit: str) -> None:
    done = call(kit, tmp_path / "work", "take", FORGE_KIT_LIMIT=limit)
    assert done.returncode == 1
    assert done.stderr.startswith("invalid FORGE_KIT_LIMIT")


@pytest.mark.parametrize(
    "text",
    ["", '{"parts": [', '{"minutes": 1}', "[]", '{"parts": []}', '{"parts": [{"name": "../x"}]}'],
)
def test_invalid_manifest_is_rejected(kit: Path, tmp_path: Path, text: str) -> None:
    (kit / "manifest.json").write_text(text)
    done = call(kit, tmp_path / "work", "take")
    assert done.returncode == 1
    assert done.stderr.startswith("invalid manifest.json")


def test_folder_that_cannot_be_written_is_reported_first(kit: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    done = call(kit, tmp_path / "work", "go", str(tmp_path / "out"))
    assert done.stderr.splitlines()[-1].startswith("FileExistsError")
    assert "vllm_forge" not in done.stderr  # the suite was not begun


def test_two_calls_do_not_work_in_one_folder(kit: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with (work / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = call(kit, work, "take")
    assert "another call works in" in done.stderr


def with_suite(kit: Path, tmp_path: Path, code: str, **manifest: str | None) -> Path:
    """A kit whose suite is this code, and which brings caches."""
    content = tmp_path / "content"
    package = content / "bundle" / "tests" / "gpu" / "harness"
    package.mkdir(parents=True)
    for part in (package, package.parent, package.parent.parent):
        (part / "__init__.py").touch()
    (package / "run.py").write_text(code)
    folder = tmp_path / "caches"
    folder.mkdir()
    (folder / "caches.json").write_text("{}")
    with tarfile.open(content / "caches.tar.xz", "w:xz") as tar:
        tar.add(folder, arcname="caches")
    for part in kit.glob("part-*"):
        part.unlink()
    parts = write_parts(content, kit, 40_000)
    (kit / "manifest.json").write_text(json.dumps({"parts": parts, **LIMITS, **manifest}))
    return kit


def test_sigterm_ends_the_suite_and_keeps_its_results(kit: Path, tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys\n"
        "signal.alarm(30)  # where nobody ends it\n"
        "results = pathlib.Path(sys.argv[2])\n"
        "results.mkdir()\n"
        "(results / 'server.json').write_text(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "while True: signal.pause()\n"
    )
    with_suite(kit, tmp_path, code)
    done = call(kit, tmp_path / "work", "go", str(tmp_path / "out"))
    assert done.returncode == 124
    suite = int((tmp_path / "out" / "server.json").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(suite, 0)


def test_caches_are_unpacked_whole_or_not_at_all(kit: Path, tmp_path: Path) -> None:
    """A call that was killed while it unpacked leaves no folder that passes for the caches."""
    with_suite(kit, tmp_path, "")
    work = tmp_path / "work"
    (work / "caches.new" / "caches" / "triton").mkdir(parents=True)
    call(kit, work, "go", str(tmp_path / "out"))
    assert [path.name for path in (work / "caches").iterdir()] == ["caches.json"]
    assert not (work / "caches.new").exists()


@pytest.mark.parametrize("moved", [True, False, None])
def test_kernels_compiled_elsewhere_are_reported(
    kit: Path, tmp_path: Path, *, moved: bool | None
) -> None:
    work, there = tmp_path / "work", tmp_path / "there"
    place = None if moved is None else str((there if moved else work) / "caches")
    with_suite(kit, tmp_path, "print('the suite ran')", compiled_at=place)
    done = call(kit, work, "go", str(tmp_path / "out"))
    assert (f"unless FORGE_KIT_WORK={there}" in done.stdout) == bool(moved)
    assert "the suite ran" in done.stdout
    assert ("compiled" in done.stdout) == bool(moved)


def test_missing_caches_are_accepted(kit: Path, tmp_path: Path) -> None:
    """Where the suite was refused before it made any."""
    out = tmp_path / "out"
    done = call(kit, tmp_path / "work", "go", str(out), FORGE_KIT_CACHES="1")
    assert "FileNotFoundError" not in done.stderr
    assert not (out / "caches.tar.xz").exists()


def test_pieces_of_an_earlier_call_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "x.tar.xz.07").write_text("old")
    kit_host.pack(tmp_path / "results", tmp_path / "x.tar.xz", 100)
    joined = b"".join(path.read_bytes() for path in sorted(tmp_path.glob("x.tar.xz.*")))
    with tarfile.open(fileobj=io.BytesIO(joined), mode="r:xz") as tar:
        assert tar.getnames() == ["results"]
    assert not (tmp_path / "x.tar.xz.07").exists()


def test_another_python_is_refused_before_anything_is_copied(kit: Path, tmp_path: Path) -> None:
    manifest = json.loads((kit / "manifest.json").read_text())
    (kit / "manifest.json").write_text(json.dumps(manifest | {"python": "2.7"}))
    done = call(kit, tmp_path / "work", "go", str(tmp_path / "out"))
    assert done.stderr.startswith("this kit is for Python 2.7, python3 is")
    assert not (tmp_path / "work").exists()


def test_usage(kit: Path, tmp_path: Path) -> None:
    done = call(kit, tmp_path / "work", "start")
    assert done.returncode == 1
    assert "kit.py take" in done.stderr


def test_joined_parts_read_as_one(tmp_path: Path) -> None:
    paths = []
    for number, text in enumerate((b"abc", b"", b"defgh")):
        path = tmp_path / str(number)
        path.write_bytes(text)
        paths.append(path)
    joined = kit_host.Joined(paths)
    assert (joined.read(2), joined.read(2), joined.read(9), joined.read(1)) == (
        b"ab", b"c", b"defgh", b"",
    )  # fmt: skip


def test_the_hosts_side_stands_alone() -> None:
    """It runs where nothing of ours is installed."""
    code = f"import sys; sys.path.insert(0, {str(HOST.parent)!r}); import kit_host"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
