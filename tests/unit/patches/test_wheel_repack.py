"""The patched wheel: what changes, what does not, and what is refused."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import pytest
from installer.sources import WheelFile

from tests.support.series import GOOD, RELEASE, SECOND, source_files
from tests.support.trees import changed_tree, write_sdist
from tests.support.wheels import COMPRESSIBLE, VLLM_WHEEL, Member, raw_member, write_vllm_wheel
from vllm_forge.patches import Applied, apply_series, build_wheel, kept_wheel, read_patch
from vllm_forge.patches.errors import WheelSourceError
from vllm_forge.patches.wheel import blob_hash, local_version

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.patches import PatchedWheel
    from vllm_forge.sources import SourceRepo

PYTHON = {path: content for path, content in source_files().items() if path.startswith("vllm/")}


@pytest.fixture
def base(repo: SourceRepo, tmp_path: Path) -> str:
    files = source_files() | {"vllm/_version.py": b"# another one than the wheel's\n"}
    return repo.import_archive(RELEASE, write_sdist(tmp_path / "a.tar.gz", files))


@pytest.fixture
def applied(repo: SourceRepo, base: str) -> Applied:
    return apply_series(repo, base, [read_patch(GOOD), read_patch(SECOND)])


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_vllm_wheel(tmp_path / "published", PYTHON)


@pytest.fixture
def patched(repo: SourceRepo, applied: Applied, published: Path, tmp_path: Path) -> PatchedWheel:
    return build_wheel(repo, applied, published, RELEASE, tmp_path / "out")


def names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as wheel:
        return wheel.namelist()


def read(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as wheel:
        return wheel.read(name)


def test_version_and_file_name(patched: PatchedWheel, applied: Applied) -> None:
    assert patched.version == f"{RELEASE}+forge.{applied.result[:12]}"
    assert patched.tree == applied.result
    assert patched.path.name == VLLM_WHEEL.replace(RELEASE, patched.version)
    info = f"vllm-{patched.version}.dist-info"
    assert f"Version: {patched.version}\n" in read(patched.path, f"{info}/METADATA").decode()
    module: dict[str, object] = {}
    exec(read(patched.path, "vllm/_version.py"), module)  # noqa: S102
    assert module["__version__"] == module["version"] == patched.version
    numbers = tuple(int(part) for part in RELEASE.split("."))
    local = patched.version.partition("+")[2]
    assert module["__version_tuple__"] == module["version_tuple"] == (*numbers, local)
    assert module["commit_id"] == "gffd46bfab"


def test_local_version_is_normal() -> None:
    from packaging.version import Version

    made = local_version("0.26.0", "0123456789abcdef")
    assert str(Version(made)) == made == "0.26.0+forge.0123456789ab"
    # All digits would lose leading zeros, were it a part of its own.
    assert Version(local_version("0.26.0", "0" * 40)).local == "forge.0"


def test_changed_files_are_the_patched_trees(
    patched: PatchedWheel, applied: Applied, repo: SourceRepo
) -> None:
    assert [file.path for file in patched.changed] == ["vllm/cache.py", "vllm/scheduler.py"]
    for file in patched.changed:
        content = read(patched.path, file.path)
        assert blob_hash(content) == file.after
        assert blob_hash(PYTHON[file.path]) == file.before
        assert content == repo.git("cat-file", "blob", f"{applied.result}:{file.path}").stdout


def test_everything_else_keeps_its_bytes(patched: PatchedWheel, published: Path) -> None:
    old_info, new_info = f"vllm-{RELEASE}.dist-info", f"vllm-{patched.version}.dist-info"
    assert names(patched.path) == [name.replace(old_info, new_info) for name in names(published)]
    different = {file.path for file in patched.changed} | {
        "vllm/_version.py", f"{old_info}/METADATA", f"{old_info}/RECORD",
    }  # fmt: skip
    same = [name for name in names(published) if name not in different]
    assert {"vllm/_C.abi3.so", "vllm/stored.bin", "vllm/py.typed", f"{old_info}/WHEEL"} <= set(same)
    with zipfile.ZipFile(published) as old, zipfile.ZipFile(patched.path) as new:
        assert new.testzip() is None
        for name in same:
            other = name.replace(old_info, new_info)
            # The compressed bytes, not only what they inflate to.
            assert raw_member(patched.path, other) == raw_member(published, name)
            before, after = old.getinfo(name), new.getinfo(other)
            for field in ("date_time", "compress_type", "external_attr", "CRC", "file_size"):
                assert getattr(after, field) == getattr(before, field)
    assert len(raw_member(patched.path, "vllm/_C.abi3.so")) < len(COMPRESSIBLE)


def test_changed_members_keep_mode_and_have_a_fixed_time(
    repo: SourceRepo, applied: Applied, tmp_path: Path
) -> None:
    sources = {path: content for path, content in PYTHON.items() if path != "vllm/cache.py"}
    tool = Member(path="vllm/cache.py", content=PYTHON["vllm/cache.py"], mode=0o755)
    published = write_vllm_wheel(tmp_path / "published", sources, extra=[tool])
    patched = build_wheel(repo, applied, published, RELEASE, tmp_path / "out")
    with zipfile.ZipFile(patched.path) as wheel:
        assert wheel.getinfo("vllm/cache.py").external_attr >> 16 & 0o777 == 0o755
        assert wheel.getinfo("vllm/cache.py").date_time == (2025, 1, 1, 0, 0, 0)


def test_same_bytes_twice(  # noqa: PLR0917
    patched: PatchedWheel, repo: SourceRepo, applied: Applied, published: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    old = os.umask(0o077)
    try:
        again = build_wheel(repo, applied, published, RELEASE, tmp_path / "again")
    finally:
        os.umask(old)
    assert again.path.read_bytes() == patched.path.read_bytes()
    assert again.path.name == patched.path.name


def test_wheel_that_is_whole_is_not_written_again(
    repo: SourceRepo, applied: Applied, published: Path, tmp_path: Path
) -> None:
    def kept() -> PatchedWheel:
        return kept_wheel(repo, applied, published, RELEASE, tmp_path / "key")

    first = kept()
    content, inode = first.path.read_bytes(), first.path.stat().st_ino
    assert kept() == first
    assert first.path.stat().st_ino == inode
    for damaged in (content[:-1], content[:-1] + b"x"):
        first.path.write_bytes(damaged)
        assert kept() == first
        assert first.path.read_bytes() == content
    inode, seal = first.path.stat().st_ino, tmp_path / "key" / "written.json"
    seal.write_text(seal.read_text().replace('"program": "', '"program": "0'))
    kept()
    assert first.path.stat().st_ino != inode


def test_another_series_is_another_version(
    patched: PatchedWheel, repo: SourceRepo, base: str, published: Path, tmp_path: Path
) -> None:
    other = apply_series(repo, base, [read_patch(GOOD)])
    made = build_wheel(repo, other, published, RELEASE, tmp_path / "other")
    assert made.version != patched.version
    assert read(made.path, "vllm/cache.py") == PYTHON["vllm/cache.py"]


def test_empty_series_still_says_that_it_is_ours(
    repo: SourceRepo, base: str, published: Path, tmp_path: Path
) -> None:
    made = build_wheel(repo, Applied(base=base, trees=()), published, RELEASE, tmp_path / "out")
    assert made.changed == ()
    assert made.version == f"{RELEASE}+forge.{base[:12]}"


def test_record_is_right(patched: PatchedWheel) -> None:
    with WheelFile.open(patched.path) as wheel:
        wheel.validate_record(validate_contents=True)
    info = f"vllm-{patched.version}.dist-info"
    rows = list(csv.reader(io.StringIO(read(patched.path, f"{info}/RECORD").decode())))
    assert [row[0] for row in rows] == [*(n for n in names(patched.path) if n != rows[-1][0]),
                                        f"{info}/RECORD"]  # fmt: skip
    assert rows[-1] == [f"{info}/RECORD", "", ""]


def test_record_check_can_fail(patched: PatchedWheel, tmp_path: Path) -> None:
    """The check above, on a wheel with one wrong byte."""
    wrong = tmp_path / patched.path.name
    with zipfile.ZipFile(patched.path) as old, zipfile.ZipFile(wrong, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content + b"#" if name == "vllm/cache.py" else content)
    with WheelFile.open(wrong) as wheel, pytest.raises(Exception, match=r"vllm/cache\.py"):
        wheel.validate_record(validate_contents=True)


def test_pip_installs_it(patched: PatchedWheel, tmp_path: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not in this environment; installer's check of RECORD is above")
    # A wheel for any platform, so that this host's pip takes it: only its tag differs.
    wheel = tmp_path / patched.path.name.replace("cp38-abi3-manylinux_2_28_x86_64", "py3-none-any")
    wheel.write_bytes(patched.path.read_bytes())
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python")]
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", str(wheel)],
        check=True,
    )
    shown = subprocess.run(
        [*pip, "show", "--files", "vllm"], check=True, capture_output=True, text=True
    ).stdout
    assert f"Version: {patched.version}\n" in shown
    assert "vllm/scheduler.py" in shown
    said = subprocess.run(
        [
            str(venv / "bin" / "python"), "-c",
            "import vllm.cache, vllm._version as v; print(v.version, vllm.cache.blocks(17))",
        ],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert said.split() == [patched.version, "2"]


# --- what is refused -----------------------------------------------------------------------------


def refuse(repo: SourceRepo, applied: Applied, published: Path, folder: Path, words: str) -> None:
    with pytest.raises(WheelSourceError, match=words) as refused:
        build_wheel(repo, applied, published, RELEASE, folder)
    assert type(refused.value) is WheelSourceError
    assert not list(folder.glob("*"))


@pytest.mark.parametrize("path", ["vllm/cache.py", "vllm/other.py"])
def test_file_that_differs_from_the_source(
    path: str, repo: SourceRepo, applied: Applied, tmp_path: Path
) -> None:
    """Also one that the series does not touch."""
    files = source_files() | {"vllm/other.py": b"a = 1\n"}
    base = repo.import_archive("other", write_sdist(tmp_path / "b.tar.gz", files))
    applied = apply_series(repo, base, [read_patch(GOOD)])
    sources = PYTHON | {"vllm/other.py": b"a = 1\n"}
    fine = write_vllm_wheel(tmp_path / "fine", sources)
    build_wheel(repo, applied, fine, RELEASE, tmp_path / "fine-out")
    sources[path] += b"# not in the source archive\n"
    published = write_vllm_wheel(tmp_path / "published", sources)
    refuse(repo, applied, published, tmp_path / "out", path)


CHANGES: dict[str, dict[str, bytes | None]] = {
    "adds a module": {"vllm/new.py": b"a = 1\n"},
    "deletes a module": {"vllm/cache.py": None},
    "renames a module": {"vllm/cache.py": None, "vllm/cash.py": PYTHON["vllm/cache.py"]},
    "changes a file outside vllm": {"README.md": b"other\n"},
    "adds a file outside vllm": {"csrc/a.cu": b"x\n"},
    "changes setup.py": {"setup.py": b"other\n"},
    "changes data of the package": {"vllm/data.json": b"{}\n"},
    "changes a good file and one outside": {"vllm/cache.py": b"a = 1\n", "README.md": b"x\n"},
    "changes the version module": {"vllm/_version.py": b"# patched\n"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_series_that_does_more_than_a_wheel_can(
    name: str, repo: SourceRepo, tmp_path: Path
) -> None:
    files = source_files() | {
        "setup.py": b"setup()\n", "vllm/data.json": b"[]\n", "vllm/_version.py": b"# another\n",
    }  # fmt: skip
    base = repo.import_archive("more", write_sdist(tmp_path / "b.tar.gz", files))
    after = changed_tree(repo, base, CHANGES[name], tmp_path / "index")
    data = Member(path="vllm/data.json", content=b"[]\n")
    published = write_vllm_wheel(tmp_path / "published", PYTHON, extra=[data])
    applied = Applied(base=base, trees=(after,))
    refuse(repo, applied, published, tmp_path / "out", "does more than change Python files")


def test_series_that_makes_a_file_executable(
    repo: SourceRepo, base: str, published: Path, tmp_path: Path
) -> None:
    """The wheel would not show it."""
    env = {"GIT_INDEX_FILE": str(tmp_path / "index")}
    repo.git("read-tree", base, env=env)
    blob = blob_hash(PYTHON["vllm/cache.py"])
    repo.git("update-index", "--cacheinfo", f"100755,{blob},vllm/cache.py", env=env)
    after = repo.git("write-tree", env=env).stdout.decode().strip()
    applied = Applied(base=base, trees=(after,))
    refuse(repo, applied, published, tmp_path / "out", "vllm/cache.py")


def test_changed_file_that_the_wheel_lacks(
    repo: SourceRepo, applied: Applied, tmp_path: Path
) -> None:
    sources = {path: content for path, content in PYTHON.items() if path != "vllm/cache.py"}
    published = write_vllm_wheel(tmp_path / "published", sources)
    refuse(repo, applied, published, tmp_path / "out", r"vllm/cache\.py")


@pytest.mark.parametrize("missing", ["vllm/_version.py", "METADATA", "RECORD"])
def test_wheel_without_what_carries_the_version(
    missing: str, repo: SourceRepo, applied: Applied, published: Path, tmp_path: Path
) -> None:
    """A release that is packed in another way is refused with our words, not with a KeyError."""
    other = tmp_path / "other" / published.name
    other.parent.mkdir()
    with zipfile.ZipFile(published) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            if not name.endswith(missing):
                new.writestr(name, old.read(name))
    refuse(repo, applied, other, tmp_path / "out", missing)


def test_wheel_whose_version_module_is_written_in_another_way(
    repo: SourceRepo, applied: Applied, published: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other" / published.name
    other.parent.mkdir()
    with zipfile.ZipFile(published) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "vllm/_version.py":
                content = content.replace(b"'9.9.1'", b'"9.9.1"')
            new.writestr(name, content)
    refuse(repo, applied, other, tmp_path / "out", "not once")


def test_failed_build_keeps_the_wheel_that_is_there(
    patched: PatchedWheel, repo: SourceRepo, applied: Applied, published: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    before = patched.path.read_bytes()

    def broken(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr("vllm_forge.patches.wheel._copy", broken)
    with pytest.raises(OSError, match="disk"):
        build_wheel(repo, applied, published, RELEASE, patched.path.parent)
    assert patched.path.read_bytes() == before
    assert [path.name for path in patched.path.parent.iterdir()] == [patched.path.name]
