"""The source archives and the repository of the cache: any byte of them may have changed.

Damage is found, forgotten and healed. What cannot be written says so: it is no verdict on a patch.
"""

from __future__ import annotations

import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.index_server import IndexServer
from tests.support.series import RELEASE, SDIST
from vllm_forge.host.errors import CacheError, CommandFailedError
from vllm_forge.patches import (
    Applied,
    apply_series,
    check_line,
    read_series,
    read_tree_lock,
    update_line,
)
from vllm_forge.patches.errors import SeriesFileError, TreeMismatchError, WrongContextError
from vllm_forge.patches.wheel import changed_files, read_blob
from vllm_forge.project import Project
from vllm_forge.sources import Index, SourceRepo
from vllm_forge.sources.errors import HashMismatchError, LockFileError


@pytest.fixture(autouse=True)
def served(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_forge.patches.series.Index", lambda: index)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 0x55
    path.chmod(0o644)
    path.write_bytes(content)


def checked(project: Project, repo: SourceRepo) -> Applied:
    """The same command once more where the first one has deleted what was damaged."""
    try:
        return check_line(project, "9.9", repo)
    except (CacheError, HashMismatchError) as error:
        assert "run the same command again" in error.remedy
    return check_line(project, "9.9", repo)


def test_any_damaged_file_of_the_repository_is_healed(
    project: Project, repo: SourceRepo, tmp_path: Path
) -> None:
    expected = check_line(project, "9.9", repo)
    whole = tmp_path / "whole"
    shutil.copytree(repo.path, whole)
    for path in files_of(whole):
        if not path.stat().st_size:
            continue
        for at in (0, path.stat().st_size // 2, -1):
            shutil.rmtree(repo.path)
            shutil.copytree(whole, repo.path)
            flip(repo.path / path.relative_to(whole), at)
            applied = checked(project, repo)
            assert applied == expected, (path, at)
            for file in changed_files(repo, applied):  # what a wheel is made of
                read_blob(repo, file.after)


def test_any_missing_file_of_the_repository_is_healed(
    project: Project, repo: SourceRepo, tmp_path: Path
) -> None:
    expected = check_line(project, "9.9", repo)
    whole = tmp_path / "whole"
    shutil.copytree(repo.path, whole)
    for path in files_of(whole):
        shutil.rmtree(repo.path)
        shutil.copytree(whole, repo.path)
        (repo.path / path.relative_to(whole)).unlink()
        assert checked(project, repo) == expected, path


def test_ref_of_another_source_is_healed(project: Project, repo: SourceRepo) -> None:
    expected = check_line(project, "9.9", repo)
    other = repo.git("commit-tree", expected.result, env=IDENT).stdout.decode().strip()
    repo.git("update-ref", f"refs/sdist/{RELEASE}", other)
    assert checked(project, repo) == expected


def test_lock_is_of_the_archive_that_it_names(
    project: Project, repo: SourceRepo, series: Path
) -> None:
    """Not of one of the same name that was imported before."""
    expected = read_tree_lock(series, "9.9")
    tree = repo.git("mktree", stdin=b"").stdout.decode().strip()
    other = repo.git("commit-tree", tree, env=IDENT).stdout.decode().strip()
    repo.git("update-ref", f"refs/sdist/{RELEASE}", other)
    update_line(project, "9.9", repo)
    assert read_tree_lock(series, "9.9") == expected


IDENT = {
    f"GIT_{who}_{key}": value
    for who in ("AUTHOR", "COMMITTER")
    for key, value in (("NAME", "x"), ("EMAIL", "x@localhost"))
}


def test_blob_of_other_content_is_not_used(repo: SourceRepo, base: str) -> None:
    digest = repo.git("hash-object", "-w", "--stdin", stdin=b"good\n").stdout.decode().strip()
    path = repo.path / "objects" / digest[:2] / digest[2:]
    path.chmod(0o644)
    path.write_bytes(zlib.compress(b"blob 5\0evil\n"))
    with pytest.raises(CacheError, match="has other content"):
        read_blob(repo, digest)


def archives(cache: Path) -> list[Path]:
    return files_of(cache / "sdists")


@pytest.mark.parametrize(
    "damage", [lambda path: flip(path, 99), Path.unlink, lambda p: p.write_bytes(b"")]
)
def test_damaged_archive_is_downloaded_again(
    project: Project,
    cache: Path,
    server: IndexServer,
    repo: SourceRepo,
    damage: Callable[[Path], None],
) -> None:
    (archive,) = archives(cache)
    before = len(server.asked(SDIST))
    damage(archive)
    repo.forget(RELEASE)
    assert checked(project, repo).result
    assert len(server.asked(SDIST)) == before + 1
    assert archives(cache) == [archive]


def test_sound_archive_is_not_downloaded_again(
    project: Project, server: IndexServer, repo: SourceRepo
) -> None:
    before = len(server.asked(SDIST))
    repo.forget(RELEASE)
    assert checked(project, repo).result
    assert len(server.asked(SDIST)) == before


def test_unwritable_repository_does_not_judge_a_patch(
    project: Project, repo: SourceRepo, series: Path
) -> None:
    base = read_tree_lock(series, "9.9").base
    shutil.rmtree(repo.path)
    archive = files_of(repo.path.parent / "sdists")[0]
    repo.import_archive(RELEASE, archive)
    for number in range(256):  # root may write whatever its mode is
        folder = repo.path / "objects" / f"{number:02x}"
        if not folder.exists():
            folder.touch()
    with pytest.raises(CommandFailedError) as failed:
        apply_series(repo, base, read_series(series))
    assert str(repo.path) in failed.value.where
    assert "unable to" in failed.value.what
    assert "write access" in failed.value.remedy


def test_other_verdicts_stay(project: Project, repo: SourceRepo, series: Path) -> None:
    lock = (series / "lock.toml").read_text()
    result = read_tree_lock(series, "9.9").result
    (series / "lock.toml").write_text(lock.replace(result, "0" * 40))
    with pytest.raises(TreeMismatchError):
        check_line(project, "9.9", repo)
    patches = read_series(series)
    with pytest.raises(WrongContextError):
        empty = repo.git("mktree", stdin=b"").stdout.decode().strip()
        apply_series(repo, empty, patches)


@pytest.mark.parametrize("name", ["../9.8/0001-x.patch", "/etc/passwd", "sub/0001-x.patch", "link"])
def test_series_names_files_of_its_folder_only(series: Path, name: str) -> None:
    text = (series / sorted(path.name for path in series.glob("*.patch"))[0]).read_bytes()
    for path in ("../9.8/0001-x.patch", "sub/0001-x.patch"):
        (series / path).parent.mkdir(exist_ok=True)
        (series / path).write_bytes(text)
    (series / "link").symlink_to(series / "../9.8/0001-x.patch")
    with (series / "series").open("a") as file:
        file.write(f"{name}\n")
    with pytest.raises(SeriesFileError, match="not a file of its folder"):
        read_series(series)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sdist", "../../x.tar.gz"), ("sdist", "/x.tar.gz"), ("sdist", "x.zip"),
        ("sha256", "../x"), ("sha256", ""), ("base", "--output=/x"), ("result", "HEAD"),
    ],
)  # fmt: skip
def test_lock_names_no_other_place(project: Project, series: Path, field: str, value: str) -> None:
    path = series / "lock.toml"
    path.write_text(re.sub(rf"(?m)^{field} = .*$", f'{field} = "{value}"', path.read_text()))
    with pytest.raises(LockFileError):
        read_tree_lock(series, "9.9")
