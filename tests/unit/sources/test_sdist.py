"""Source archives as git trees: the hash depends on the archive and on nothing of the host."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import random
import signal
import subprocess
import sys
import tarfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.support.trees import TOP, Item, write_sdist, write_tar
from vllm_forge.host.errors import CacheError, CommandFailedError
from vllm_forge.sources import SourceRepo
from vllm_forge.sources.errors import SdistError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

ITEMS = (
    Item(path=TOP, kind=tarfile.DIRTYPE, mode=0o755),
    Item(path=f"{TOP}/README.md", content=b"hello\n"),
    Item(path=f"{TOP}/dos.txt", content=b"one\r\ntwo\r\n"),
    Item(path=f"{TOP}/mixed.py", content=b"a = 1 \r\n\tb = 2\t\nno newline at the end"),
    Item(path=f"{TOP}/run.sh", content=b"#!/bin/sh\n", mode=0o755),
    Item(path=f"{TOP}/group.sh", content=b"#!/bin/sh\n", mode=0o654),
    Item(path=f"{TOP}/link", kind=tarfile.SYMTYPE, link="README.md"),
    Item(path=f"{TOP}/vllm", kind=tarfile.DIRTYPE, mode=0o755),
    Item(path=f"{TOP}/vllm/empty.py"),
    Item(path=f"{TOP}/vllm/$Id$.py", content=b"# $Id$\n"),
    Item(path=f"{TOP}/vllm/with space.py", content=b"pass\n"),
    Item(path=f'{TOP}/vllm/"quoted"\\.py', content=b"pass\n"),
    Item(path=f"{TOP}/vllm/caf\u00e9.py", content=b"pass\n"),
    Item(path=f"{TOP}/vllm/{'long' * 40}/{'name' * 30}.py", content=b"pass\n"),
    Item(path=f"{TOP}/binary.bin", content=bytes(range(256)) * 5),
)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "vllm.tar.gz", ITEMS)


def refs(repo: SourceRepo) -> bytes:
    return repo.git("for-each-ref").stdout


def test_files_modes_and_links(repo: SourceRepo, archive: Path) -> None:
    tree = repo.import_archive("1.0", archive)
    listing = repo.git("ls-tree", "-r", "-z", tree).stdout.decode()
    rows: dict[str, str] = {}
    for row in listing.rstrip("\0").split("\0"):
        about, _, path = row.partition("\t")
        rows[path] = about
    expected = {item.path.removeprefix(f"{TOP}/"): item for item in ITEMS if item.kind != b"5"}
    assert set(rows) == set(expected)
    for path, item in expected.items():
        mode, kind, blob = rows[path].split()
        content = repo.git("cat-file", "blob", blob).stdout
        assert kind == "blob"
        if item.kind == tarfile.SYMTYPE:
            assert (mode, content) == ("120000", item.link.encode())
        else:
            assert mode == ("100755" if item.mode & 0o100 else "100644")
            assert content == item.content


def test_same_archive_same_tree_wherever(repo: SourceRepo, archive: Path, tmp_path: Path) -> None:
    first = repo.import_archive("1.0", archive)
    other = SourceRepo(tmp_path / "other.git")
    assert other.import_archive("another-name", archive) == first
    again = write_tar(tmp_path / "again.tar.gz", reversed(ITEMS[1:]))
    assert repo.import_archive("reversed", again) == first


def test_leading_dot_is_not_a_folder(repo: SourceRepo, archive: Path, tmp_path: Path) -> None:
    dotted = [Item(path=".", kind=tarfile.DIRTYPE, mode=0o755)]
    for item in ITEMS:
        dotted.append(dataclasses.replace(item, path=f"./{item.path}"))
    other = write_tar(tmp_path / "dotted.tar.gz", dotted)
    assert repo.import_archive("dotted", other) == repo.import_archive("1.0", archive)


def test_known_tree_hash(repo: SourceRepo, tmp_path: Path) -> None:
    """As git itself names it: printf 'hello\\n' in README.md and nothing else."""
    made = repo.import_archive("1", write_sdist(tmp_path / "a.tar.gz", {"README.md": b"hello\n"}))
    blob = "ce013625030ba8dba906f756967f9e9ca394464a"
    row = b"100644 README.md\0" + bytes.fromhex(blob)
    expected = hashlib.sha1(b"tree %d\0" % len(row) + row, usedforsecurity=False).hexdigest()
    assert made == expected


def test_second_import_is_a_no_op(
    repo: SourceRepo, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = repo.import_archive("1.0", archive)
    before = refs(repo)
    archive.unlink()  # not even looked at
    started: list[object] = []
    monkeypatch.setattr(subprocess, "Popen", started.append)
    monkeypatch.setattr(SourceRepo, "tree", lambda *_: tree)
    assert repo.import_archive("1.0", archive) == tree
    monkeypatch.undo()
    assert started == []
    assert refs(repo) == before


def test_unknown_ref_has_no_tree(repo: SourceRepo, archive: Path) -> None:
    assert repo.tree("1.0") is None
    repo.import_archive("1.0", archive)
    assert repo.tree("2.0") is None


HOSTILE_CONFIG = """\
[core]
    autocrlf = true
    eol = crlf
    safecrlf = true
    quotePath = false
    attributesFile = {attributes}
    hooksPath = {hooks}
    fileMode = false
    symlinks = false
    ignoreCase = true
[apply]
    whitespace = fix
    ignoreWhitespace = change
[diff]
    noprefix = true
    mnemonicPrefix = true
    context = 9
    algorithm = patience
    renames = copies
    external = /bin/false
    wordRegex = .
    indentHeuristic = false
    interHunkContext = 50
    suppressBlankEmpty = true
[diff "python"]
    xfuncname = "nothing"
    textconv = /bin/false
[filter "upper"]
    clean = tr a-z A-Z
    smudge = tr a-z A-Z
    required = true
[color]
    ui = always
[i18n]
    logOutputEncoding = latin1
[init]
    defaultObjectFormat = sha256
    templateDir = {template}
[transfer]
    fsckObjects = true
"""
HOSTILE_ATTRIBUTES = (
    "* text=auto eol=crlf filter=upper ident diff=python whitespace=fix\n*.py -diff\n"
)


@pytest.fixture
def hostile_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whose git settings change what applies and how it is shown."""
    home = tmp_path / "home"
    hooks = home / "hooks"
    template = home / "template"
    (home / ".config" / "git").mkdir(parents=True)
    hooks.mkdir()
    (template / "info").mkdir(parents=True)
    (home / "attributes").write_text(HOSTILE_ATTRIBUTES)
    (home / ".config" / "git" / "attributes").write_text(HOSTILE_ATTRIBUTES)
    (template / "info" / "attributes").write_text(HOSTILE_ATTRIBUTES)
    config = HOSTILE_CONFIG.format(attributes=home / "attributes", hooks=hooks, template=template)
    (home / ".gitconfig").write_text(config)
    (home / ".config" / "git" / "config").write_text(config)
    hook = hooks / "reference-transaction"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(home / ".gitconfig"))
    monkeypatch.setenv("GIT_DIR", str(home))
    monkeypatch.setenv("GIT_INDEX_FILE", str(home / "index"))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "/bin/false")
    monkeypatch.setenv("GIT_DEFAULT_HASH", "sha256")
    monkeypatch.setenv("GIT_TEMPLATE_DIR", str(template))
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    monkeypatch.setenv("LANGUAGE", "de")


def test_tree_does_not_depend_on_the_users_git(
    repo: SourceRepo, archive: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected = repo.import_archive("1.0", archive)
    request.getfixturevalue("hostile_home")
    assert SourceRepo(tmp_path / "other.git").import_archive("1.0", archive) == expected
    assert repo.tree("1.0") == expected


def test_patches_do_not_depend_on_the_users_git(
    repo: SourceRepo, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A canonical patch stays canonical whatever ~/.gitconfig and ~/.config/git say."""
    from tests.support.trees import patch_text
    from vllm_forge.patches import apply_series, read_patch

    lines = [f"    line_{n} = {n} \n" for n in range(30)]
    before = "".join(["def outer():\n", *lines]).encode()
    after = before.replace(b"line_20 = 20 \n", b"line_20 = 21 \t\n")
    base = repo.import_archive("1.0", write_sdist(tmp_path / "a.tar.gz", {"vllm/a.py": before}))
    path = tmp_path / "a.patch"
    path.write_text(patch_text(repo, base, {"vllm/a.py": after}, tmp_path / "index"))
    expected = apply_series(repo, base, [read_patch(path)])
    request.getfixturevalue("hostile_home")
    assert apply_series(repo, base, [read_patch(path)]) == expected
    assert "@@ def outer():" in path.read_text()


def truncated(folder: Path) -> Path:
    path = write_tar(folder / "whole.tar.gz", ITEMS)
    blob = path.read_bytes()
    path.write_bytes(blob[: len(blob) // 2])
    return path


def truncated_inside(folder: Path) -> Path:
    """A sound gzip file around a tar that ends in the middle of a file."""
    tar = gzip.decompress(write_tar(folder / "whole.tar.gz", ITEMS).read_bytes())
    end = tar.index(bytes(range(256))) + 100
    path = folder / "inside.tar.gz"
    path.write_bytes(gzip.compress(tar[:end]))
    return path


def damaged(folder: Path) -> Path:
    """A flipped byte in the deflate stream."""
    path = write_tar(
        folder / "whole.tar.gz", [*ITEMS, Item(path=f"{TOP}/z", content=b"xyz" * 9999)]
    )
    blob = bytearray(path.read_bytes())
    blob[30:60] = bytes(byte ^ 0x55 for byte in blob[30:60])
    path.write_bytes(blob)
    return path


def written(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def items(*these: Item) -> Callable[[Path], Path]:
    return lambda folder: write_tar(folder / "bad.tar.gz", these)


FINE = Item(path=f"{TOP}/a.py", content=b"a\n" * 100_000)
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "parent-folder": (items(FINE, Item(path=f"{TOP}/../../etc/x")), "leaves the archive"),
    "absolute": (items(FINE, Item(path="/etc/x")), "leaves the archive"),
    "parent-folder-first": (items(Item(path="../x")), "leaves the archive"),
    "two-top-folders": (items(FINE, Item(path="other/b.py")), "more than one folder"),
    "no-folder": (items(Item(path="a.py", content=b"a")), "no file"),
    "hard-link": (
        items(FINE, Item(path=f"{TOP}/b", kind=tarfile.LNKTYPE, link=f"{TOP}/a.py")),
        "neither file, folder nor link",
    ),
    "device": (items(FINE, Item(path=f"{TOP}/null", kind=tarfile.CHRTYPE)), "neither file"),
    "empty-archive": (items(), "no file"),
    "only-a-folder": (items(Item(path=TOP, kind=tarfile.DIRTYPE)), "no file"),
    "garbage": (written("g.tar.gz", b"this is no archive at all" * 50), "not a readable"),
    "empty-file": (written("e.tar.gz", b""), "not a readable"),
    "html": (written("h.tar.gz", b"<!doctype html><title>Log in</title>"), "not a readable"),
    "gzip-of-garbage": (written("z.tar.gz", gzip.compress(b"garbage" * 300)), "not a readable"),
    "truncated": (truncated, "not a readable"),
    "truncated-inside": (truncated_inside, "not a readable"),
    "damaged": (damaged, "not a readable"),
    "missing": (lambda folder: folder / "none.tar.gz", "not a readable"),
}

IMPORT = """
import sys, pathlib
from vllm_forge.sources import SourceRepo
SourceRepo().import_archive("1.0", pathlib.Path(sys.argv[1]))
"""


@contextmanager
def not_for_ever() -> Iterator[None]:
    """Fail instead of hanging."""

    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", BAD)
def test_bad_archive_is_refused_and_leaves_nothing(
    name: str, repo: SourceRepo, tmp_path: Path, archive: Path
) -> None:
    """One of these once waited for ever for git fast-import; the alarm ends such a test."""
    tree = repo.import_archive("good", archive)
    before = refs(repo)
    make, words = BAD[name]
    path = make(tmp_path)
    with not_for_ever(), pytest.raises(SdistError) as refused:
        repo.import_archive("bad", path)
    assert words in refused.value.what
    assert str(path) in refused.value.where
    assert refs(repo) == before
    assert repo.tree("bad") is None
    assert repo.tree("good") == tree
    assert list((repo.path / "objects" / "pack").glob("tmp_*")) == []


def test_import_goes_on_after_a_refusal(repo: SourceRepo, archive: Path, tmp_path: Path) -> None:
    garbage = BAD["garbage"][0](tmp_path)
    with pytest.raises(SdistError):
        repo.import_archive("1.0", garbage)
    assert repo.import_archive("1.0", archive)


def test_kill_in_the_middle_leaves_no_ref(repo: SourceRepo, tmp_path: Path, cache: Path) -> None:
    """The archive comes through a pipe, so that the half of it is all there is to read."""
    noise = random.Random(0).randbytes(1 << 18)  # noqa: S311
    files = {f"vllm/{n}.bin": bytes([n]) + noise for n in range(8)}
    archive = write_sdist(tmp_path / "whole.tar.gz", files)
    expected = SourceRepo(tmp_path / "other.git").import_archive("1.0", archive)
    pipe = tmp_path / "vllm.tar.gz"
    os.mkfifo(pipe)
    command = [sys.executable, "-c", IMPORT, str(pipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        blob = archive.read_bytes()
        with pipe.open("wb", buffering=0) as feed:
            view = memoryview(blob)[: len(blob) // 2]
            while view:
                view = view[feed.write(view) :]
            child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
        assert child.stdout is not None
        assert child.stdout.read() == b""  # ends when git, which inherited it, has ended
    assert repo.tree("1.0") is None
    assert repo.import_archive("1.0", archive) == expected
    assert list((repo.path / "objects" / "pack").glob("tmp_*")) == []
    assert list(repo.path.glob("fast_import_crash_*")) == []


def test_git_that_fails_is_named(repo: SourceRepo, archive: Path) -> None:
    repo.import_archive("1.0", archive)
    with pytest.raises(CommandFailedError, match="git rev-parse") as refused:
        repo.git("rev-parse", "--verify", "no-such-thing")
    assert str(repo.path) in refused.value.where


def test_names_of_the_archive_are_not_options(repo: SourceRepo, tmp_path: Path) -> None:
    names: Sequence[str] = ("-rf", "M 100644 inline x", "from refs/heads/main", "a\nb")
    made = write_sdist(tmp_path / "a.tar.gz", dict.fromkeys(names, b"x"))
    tree = repo.import_archive("1.0", made)
    listing = repo.git("ls-tree", "-r", "--name-only", "-z", tree).stdout.decode()
    assert sorted(listing.rstrip("\0").split("\0")) == sorted(names)


@pytest.mark.parametrize("place", ["cache", "elsewhere"])
def test_damaged_repository_is_deleted_from_the_cache_only(place: str, tmp_path: Path) -> None:
    """Elsewhere it is a user's own checkout."""
    repo = SourceRepo(tmp_path / place / "sources.git")
    repo.path.parent.mkdir(exist_ok=True)
    repo.import_archive("1.0", write_sdist(tmp_path / "s.tar.gz", {"vllm/a.py": b"a = 1\n"}))
    with pytest.raises(SdistError, match="something else"), repo.mending():
        raise SdistError("something else")
    assert repo.path.exists()
    (repo.path / "refs" / "sdist" / "1.0").write_text("not a hash\n")
    expected = CacheError if place == "cache" else SdistError
    with pytest.raises(expected), repo.mending():
        raise SdistError("something else")
    assert repo.path.exists() == (place == "elsewhere")
