"""Patches as commits and back: byte for byte, or a clear error and nothing changed."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.series import BROKEN, GOOD, SECOND
from vllm_forge.cli import main
from vllm_forge.errors import ForgeError, UsageError
from vllm_forge.patches import check_line, read_series, read_tree_lock
from vllm_forge.patches.authoring import BASE, checkout, export
from vllm_forge.patches.errors import (
    CorruptPatchError,
    DirtyTreeError,
    EmptyPatchError,
    LineEndingError,
    NonCanonicalPatchError,
    PatchHeaderError,
    WheelSourceError,
    WrongBaseError,
    WrongContextError,
)
from vllm_forge.sources.errors import LockFileError
from vllm_forge.sources.sdist import git_env

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm_forge.matrix import Line
    from vllm_forge.project import Project
    from vllm_forge.sources import SourceRepo

TRAILERS = """
Origin: vendor, written for a test
Bug: https://example.org/2
Forwarded: not-needed
Applied-Upstream: no
Author: tests
Last-Update: 2026-11-29
Skus: all
Proves: tests/unit/test_nothing.py::test_nothing
Drop-When: the test is gone
"""


class Work:
    """A patch checkout and what a user does in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def git(self, *args: str, stdin: str | None = None, check: bool = True) -> str:
        return subprocess.run(
            ["git", "-C", self.folder, "-c", "user.name=t", "-c", "user.email=t@localhost", *args],
            env=git_env() | {"GIT_EDITOR": "true", "GIT_SEQUENCE_EDITOR": "true"},
            input=stdin, capture_output=True, text=True, check=check,
        ).stdout.strip()  # fmt: skip

    def write(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)

    def append(self, name: str, text: str) -> None:
        with (self.folder / name).open("a") as file:
            file.write(text)

    def commit(self, message: str, *options: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "-F", "-", *options, stdin=message)


@pytest.fixture
def work(project: Project, repo: SourceRepo, tmp_path: Path) -> Work:
    checkout(project, "9.9", repo, tmp_path / "work")
    return Work(tmp_path / "work")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- what is right -------------------------------------------------------------------------------


def test_checkout_and_export_are_a_round_trip(project: Project, work: Work, series: Path) -> None:
    before = contents(project.root)
    name, patches = export(project, work.folder)
    assert name == "9.9"
    assert [patch.name for patch in patches] == [GOOD.name, SECOND.name]
    assert contents(project.root) == before
    export(project, work.folder)
    assert contents(project.root) == before
    assert not list(series.parent.glob(".tmp-*"))


def test_checkout_is_a_clean_branch_with_a_commit_a_patch(
    project: Project, work: Work, series: Path
) -> None:
    assert work.git("status", "--porcelain") == ""
    assert work.git("symbolic-ref", "--short", "HEAD") == "forge/9.9"
    lock = read_tree_lock(series, "9.9")
    assert work.git("rev-parse", f"{BASE}^{{tree}}") == lock.base
    assert work.git("rev-parse", "HEAD^{tree}") == lock.result
    subjects = work.git("log", "--format=%s", "--reverse", f"{BASE}..").splitlines()
    assert subjects == [patch.summary for patch in read_series(series)]
    trailers = work.git("log", "-1", "--format=%(trailers:key=Proves,valueonly)", "HEAD")
    assert trailers == "tests/unit/test_nothing.py::test_nothing"


def test_files_have_the_bytes_of_the_source(
    project: Project, repo: SourceRepo, tmp_path: Path, row: Line
) -> None:
    """Neither .gitattributes nor the user's configuration changes a line end."""
    work = Work(tmp_path / "work")
    checkout(project, "9.9", repo, work.folder)
    work.write(".gitattributes", b"* text=auto eol=crlf\n")
    work.commit("attributes" + "\n" + TRAILERS)
    work.git("rm", "--quiet", "--cached", "-r", ".")
    work.git("-c", "core.autocrlf=true", "reset", "--quiet", "--hard")
    assert b"\r" not in (work.folder / "vllm" / "scheduler.py").read_bytes()
    assert work.git("status", "--porcelain") == ""


def test_settings_of_the_checkout_change_no_patch(
    project: Project, work: Work, repo: SourceRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do the attributes of the directory in which export runs."""
    (tmp_path / "order").write_text("vllm/scheduler.py\n")
    (tmp_path / ".gitattributes").write_text("*.py -diff\n")
    monkeypatch.chdir(tmp_path)
    file = work.folder / "vllm" / "scheduler.py"
    file.write_text(f"# first\n{file.read_text()}\n# last\n")
    work.append("vllm/cache.py", "more = 1\n")
    work.commit("Café\n" + TRAILERS)
    for name, value in {
        "diff.interHunkContext": "40",
        "diff.suppressBlankEmpty": "true",
        "diff.orderFile": "order",
        "i18n.logOutputEncoding": "latin1",
    }.items():
        work.git("config", name, value)
    _, patches = export(project, work.folder)
    assert patches[-1].summary == "Café"
    check_line(project, "9.9", repo)


def test_new_commit_becomes_a_patch(
    project: Project, work: Work, repo: SourceRepo, series: Path, row: Line
) -> None:
    work.append("vllm/cache.py", "\n# more\n")
    work.commit("Say more: a b\n\nsecond line\n  # indented\n\nthird\n" + TRAILERS)
    _, patches = export(project, work.folder)
    assert [patch.name for patch in patches] == [GOOD.name, SECOND.name, "0003-say-more-a-b.patch"]
    assert patches[-1].fields["Description"] == (
        "Say more: a b\nsecond line\n  # indented\n\nthird"
    )
    assert patches[-1].path.read_text().endswith("+# more\n")
    assert (series / "series").read_text() == (
        f"# the order matters\n{GOOD.name}\n\n{SECOND.name}\n0003-say-more-a-b.patch\n"
    )
    applied = check_line(project, "9.9", repo)
    assert applied.result == work.git("rev-parse", "HEAD^{tree}")


def test_exported_branch_can_be_checked_out_again(
    project: Project, work: Work, repo: SourceRepo, tmp_path: Path
) -> None:
    work.append("vllm/cache.py", "# more\n")
    work.commit("Say more\n\nwith a body\n\nof two paragraphs\n" + TRAILERS)
    export(project, work.folder)
    before = contents(project.root)
    checkout(project, "9.9", repo, tmp_path / "again")
    export(project, tmp_path / "again")
    assert contents(project.root) == before


def test_edited_dropped_and_reordered_commits(project: Project, work: Work, series: Path) -> None:
    first, second = work.git("rev-list", "--reverse", f"{BASE}..").splitlines()
    work.git("reset", "--quiet", "--hard", BASE)
    work.git("cherry-pick", second, first)
    export(project, work.folder)
    assert [patch.name for patch in read_series(series)] == [SECOND.name, GOOD.name]
    assert (series / GOOD.name).read_bytes() == GOOD.read_bytes()
    work.git("reset", "--quiet", "--hard", "HEAD~")
    export(project, work.folder)
    assert (series / "series").read_text() == f"\n{SECOND.name}\n"
    assert not (series / GOOD.name).exists()
    work.git("reset", "--quiet", "--hard", BASE)
    export(project, work.folder)
    assert read_series(series) == ()
    lock = read_tree_lock(series, "9.9")
    assert lock.result == lock.base


def test_trailer_order_does_not_matter(project: Project, work: Work, series: Path) -> None:
    rows = TRAILERS.strip().splitlines()
    work.append("vllm/cache.py", "# more\n")
    work.commit("More\n\n" + "\n".join(["Patch: 0003-x.patch", *reversed(rows)]) + "\n")
    export(project, work.folder)
    assert (series / "0003-x.patch").read_text().startswith("Description: More\nOrigin: ")


@pytest.mark.parametrize("form", ["shifted", "short-index"])
def test_patch_of_another_form_is_exported_in_the_canonical_one(
    project: Project, repo: SourceRepo, series: Path, tmp_path: Path, form: str
) -> None:
    shutil.copy(BROKEN / f"{form}.patch", series / GOOD.name)
    checkout(project, "9.9", repo, tmp_path / "work")
    export(project, tmp_path / "work")
    diffs = [path.read_text().partition("\n---\n")[2] for path in (series / GOOD.name, GOOD)]
    assert diffs[0] == diffs[1]


def test_other_files_of_the_series_stay(project: Project, series: Path, repo: SourceRepo,
                                        tmp_path: Path) -> None:  # fmt: skip
    (series / "README.md").write_text("why\n")
    checkout(project, "9.9", repo, tmp_path / "work")
    export(project, tmp_path / "work")
    assert (series / "README.md").read_text() == "why\n"


# --- refused, and nothing changed ----------------------------------------------------------------


def refuse_export(project: Project, work: Work, kind: type[ForgeError]) -> ForgeError:
    before, head = contents(project.root), contents(work.folder)
    with pytest.raises(kind) as refused:
        export(project, work.folder)
    assert type(refused.value) is kind
    assert contents(project.root) == before
    assert contents(work.folder).keys() == head.keys()
    return refused.value


def modified(work: Work) -> None:
    work.append("vllm/cache.py", "# more\n")


def staged(work: Work) -> None:
    modified(work)
    work.git("add", "--all")


def untracked(work: Work) -> None:
    work.write("vllm/new.py", b"x = 1\n")


def conflicted_rebase(work: Work) -> None:
    work.git("checkout", "--quiet", "-b", "other", BASE)
    text = (work.folder / "vllm" / "scheduler.py").read_text()
    (work.folder / "vllm" / "scheduler.py").write_text(text.replace("room = ", "space = "))
    work.commit("Other\n" + TRAILERS)
    work.git("rebase", "forge/9.9", check=False)
    assert (work.folder / ".git" / "rebase-merge").exists()


def stopped_rebase(work: Work) -> None:
    """Nothing is modified, yet the commits are not all there."""
    work.git("rebase", "--exec", "false", BASE, check=False)
    assert work.git("status", "--porcelain") == ""


def detached(work: Work) -> None:
    """As after git checkout HEAD~1, or in a bisect: the last patch would be deleted."""
    work.git("checkout", "--quiet", "--detach", "HEAD~1")


def stopped_in_linked_tree(work: Work) -> None:
    """A rebase whose state is not in the .git of the work tree, which is a file there."""
    work.git("checkout", "--quiet", "--detach")
    work.git("worktree", "add", "--quiet", "linked", "forge/9.9")
    work.folder /= "linked"
    stopped_rebase(work)


def part_of_cherry_picks(work: Work) -> None:
    """A conflict that was ended by git commit, so that CHERRY_PICK_HEAD is gone."""
    work.git("checkout", "--quiet", "-b", "other", BASE)
    text = (work.folder / "vllm" / "scheduler.py").read_text()
    (work.folder / "vllm" / "scheduler.py").write_text(text.replace("room = ", "space = "))
    work.commit("Other\n" + TRAILERS)
    work.git("cherry-pick", "forge/9.9~1", "forge/9.9", check=False)
    work.git("checkout", "--quiet", "--theirs", ".")
    work.git("commit", "--quiet", "--all", "--no-edit")
    assert work.git("status", "--porcelain") == ""


def squashed(work: Work) -> None:
    """The editor left both messages as they were; git's own comments are gone."""
    modified(work)
    work.commit(f"squash! {work.git('log', '-1', '--format=%s')}\n" + TRAILERS)
    work.git("rebase", "--quiet", "--interactive", "--autosquash", BASE)
    assert "This is a combination" not in work.git("log", "-1", "--format=%B")


def empty_commit(work: Work) -> None:
    work.commit("Nothing\n" + TRAILERS, "--allow-empty")


def commit_of(message: str) -> Callable[[Work], None]:
    def commit(work: Work) -> None:
        modified(work)
        work.commit(message)

    return commit


def without(name: str) -> str:
    rows = TRAILERS.splitlines(keepends=True)
    return "More\n" + "".join(row for row in rows if not row.startswith(f"{name}: "))


def merge(work: Work) -> None:
    work.git("checkout", "--quiet", "-b", "other", BASE)
    work.append("README.md", "more\n")
    work.commit("More\n" + TRAILERS)
    work.git("merge", "--quiet", "--no-edit", "forge/9.9")


def orphan(work: Work) -> None:
    work.git("checkout", "--quiet", "--orphan", "other")
    work.commit("More\n" + TRAILERS)


def base_moved(work: Work) -> None:
    work.git("update-ref", BASE, "HEAD~1")


def base_lost(work: Work) -> None:
    work.git("update-ref", "-d", BASE)


def crlf(work: Work) -> None:
    work.write("vllm/dos.py", b"one\r\n")
    work.commit("CRLF\n" + TRAILERS)


def latin1(work: Work) -> None:
    work.write("vllm/latin.py", b"caf\xe9\n")
    work.commit("Latin-1\n" + TRAILERS)


def binary(work: Work) -> None:
    work.write("vllm/data.bin", bytes(range(256)))
    work.commit("Binary\n" + TRAILERS)


def text_and_binary(work: Work) -> None:
    work.append("vllm/cache.py", "more = 1\n")
    binary(work)


def outside(work: Work) -> None:
    work.write("setup.py", b"x = 1\n")
    work.commit("Setup\n" + TRAILERS)


def renamed(work: Work) -> None:
    work.git("mv", "vllm/cache.py", "vllm/cash.py")
    work.commit("Rename\n" + TRAILERS)


def executable(work: Work) -> None:
    (work.folder / "vllm/cache.py").chmod(0o755)
    work.append("vllm/cache.py", "more = 1\n")
    work.commit("Mode\n" + TRAILERS)


REFUSED: dict[str, tuple[Callable[[Work], None], type[ForgeError], str]] = {
    "modified": (modified, DirtyTreeError, "vllm/cache.py"),
    "staged": (staged, DirtyTreeError, "vllm/cache.py"),
    "untracked": (untracked, DirtyTreeError, "?? vllm/new.py"),
    "conflict": (conflicted_rebase, DirtyTreeError, "git rebase --continue"),
    "stopped-rebase": (stopped_rebase, DirtyTreeError, "git rebase --continue"),
    "detached": (detached, DirtyTreeError, "HEAD is detached"),
    "linked": (stopped_in_linked_tree, DirtyTreeError, "git rebase --continue"),
    "cherry-picks": (part_of_cherry_picks, DirtyTreeError, "git cherry-pick --continue"),
    "squash": (squashed, PatchHeaderError, "Origin is given above the last paragraph"),
    "hook": (commit_of("More\n" + TRAILERS + "\nChange-Id: I1\n"), PatchHeaderError, "above"),
    "empty-commit": (empty_commit, EmptyPatchError, "(Nothing)"),
    "no-trailers": (commit_of("More\n\nbody: of text\n"), PatchHeaderError, "missing: Origin, Bug"),
    "subject-only": (commit_of("More\n"), PatchHeaderError, "(More)"),
    "no-proves": (commit_of(without("Proves")), PatchHeaderError, "missing: Proves"),
    "no-drop-when": (commit_of(without("Drop-When")), PatchHeaderError, "missing: Drop-When"),
    "unknown-field": (
        commit_of("More\n" + TRAILERS + "Signed-off-by: me\n"), PatchHeaderError, "'Signed-off-by'",
    ),
    "doubled-field": (
        commit_of("More\n" + TRAILERS + "Skus: all\n"), PatchHeaderError, "duplicate field Skus",
    ),
    "bad-date": (
        commit_of("More\n" + TRAILERS.replace("2026-11-29", "today")), PatchHeaderError, "'today'",
    ),
    "bad-name": (
        commit_of("More\n" + TRAILERS + "Patch: ../x.patch\n"), PatchHeaderError, "'../x.patch'",
    ),
    "two-names": (
        commit_of("More\n" + TRAILERS + "Patch: a.patch\nPatch: b.patch\n"),
        PatchHeaderError, "'Patch'",
    ),
    "same-name": (
        commit_of("More\n" + TRAILERS + f"Patch: {GOOD.name}\n"), PatchHeaderError, GOOD.name,
    ),
    "merge": (merge, NonCanonicalPatchError, "is a merge"),
    "orphan": (orphan, WrongBaseError, "does not start at"),
    "base-moved": (base_moved, WrongBaseError, "source tree"),
    "base-lost": (base_lost, WrongBaseError, "source tree unknown"),
    "crlf": (crlf, LineEndingError, "(CRLF)"),
    "not-utf-8": (latin1, NonCanonicalPatchError, "(Latin-1)"),
    "binary": (binary, EmptyPatchError, "(Binary)"),
    "not-in-the-wheel": (outside, WheelSourceError, "setup.py"),
    "renamed": (renamed, WheelSourceError, "D vllm/cache.py"),
    "mode": (executable, WheelSourceError, "M vllm/cache.py (mode 100644, then 100755)"),
    "text-and-binary": (text_and_binary, CorruptPatchError, "a binary file: vllm/data.bin"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_export_is_refused_and_changes_nothing(name: str, project: Project, work: Work) -> None:
    change, kind, words = REFUSED[name]
    change(work)
    error = refuse_export(project, work, kind)
    assert words in str(error)
    assert error.remedy


def test_line_with_another_source_is_refused(project: Project, work: Work, series: Path) -> None:
    path = series / "lock.toml"
    lock = read_tree_lock(series, "9.9")
    path.write_text(path.read_text().replace(lock.base, "ab" * 20))
    assert "check the line out" in refuse_export(project, work, WrongBaseError).remedy


def test_series_changed_since_the_checkout_is_not_overwritten(
    project: Project, work: Work, series: Path
) -> None:
    modified(work)
    work.commit("More\n" + TRAILERS)
    text = (series / GOOD.name).read_text()
    (series / GOOD.name).write_text(text.replace("Skus: all", "Skus: b300"))
    assert "changed since the checkout" in refuse_export(project, work, WrongBaseError).what


def test_export_that_was_killed_before_its_end_can_be_repeated(
    project: Project, work: Work, series: Path
) -> None:
    modified(work)
    work.commit("More\n" + TRAILERS)
    old = work.git("config", "forge.series")
    export(project, work.folder)
    work.git("config", "forge.series", old)
    before = contents(series)
    export(project, work.folder)
    assert contents(series) == before


@pytest.mark.parametrize("kind", ["missing", "plain-folder", "git-folder"])
def test_export_of_another_directory_is_refused(
    kind: str, project: Project, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    if kind != "missing":
        folder.mkdir()
    if kind == "git-folder":
        subprocess.run(["git", "init", "-q", folder], env=git_env(), check=True)
    before = contents(project.root)
    with pytest.raises(UsageError, match="not a patch checkout"):
        export(project, folder)
    assert contents(project.root) == before


@pytest.mark.parametrize("kind", ["folder", "file", "broken-link"])
def test_checkout_into_what_exists_is_refused(
    kind: str, project: Project, repo: SourceRepo, tmp_path: Path
) -> None:
    target = tmp_path / "work"
    match kind:
        case "folder":
            target.mkdir()
        case "file":
            target.write_text("mine")
        case _:
            target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists"):
        checkout(project, "9.9", repo, target)
    assert target.is_symlink() == (kind == "broken-link")
    if kind == "folder":
        assert not list(target.iterdir())
    elif kind == "file":
        assert target.read_text() == "mine"


def fuzzy(series: Path) -> None:
    shutil.copy(BROKEN / "fuzzy-context.patch", series / GOOD.name)


CHECKOUT_REFUSED: dict[str, tuple[Callable[[Path], object], type[ForgeError]]] = {
    "conflict": (fuzzy, WrongContextError),
    "no-lock": (lambda series: (series / "lock.toml").unlink(), LockFileError),
    "other-base": (
        lambda series: (series / "lock.toml").write_text(
            re.sub('base = ".*"', 'base = "' + 40 * "0" + '"', (series / "lock.toml").read_text())
        ),
        WrongBaseError,
    ),
}


@pytest.mark.parametrize("name", CHECKOUT_REFUSED)
def test_checkout_that_fails_leaves_nothing(
    name: str, project: Project, repo: SourceRepo, series: Path, tmp_path: Path
) -> None:
    change, kind = CHECKOUT_REFUSED[name]
    change(series)
    before = contents(project.root)
    with pytest.raises(kind):
        checkout(project, "9.9", repo, tmp_path / "work")
    assert not (tmp_path / "work").exists()
    assert not list(tmp_path.glob(".tmp-*"))
    assert contents(project.root) == before


def test_header_that_no_message_can_hold_is_refused(
    project: Project, repo: SourceRepo, series: Path, tmp_path: Path
) -> None:
    """The second line of the description is empty: a message has a blank line there anyway."""
    text = GOOD.read_text().replace("\n Applies", "\n \n Applies", 1)
    assert text != GOOD.read_text()
    (series / GOOD.name).write_text(text)
    with pytest.raises(PatchHeaderError, match="commit message") as refused:
        checkout(project, "9.9", repo, tmp_path / "work")
    assert GOOD.name in refused.value.where


def test_commands(
    project: Project, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("vllm_forge.project.load", lambda _root: project.matrix)
    monkeypatch.setattr("vllm_forge.project.find_root", lambda: project.root)
    assert main(["patch", "checkout", str(tmp_path / "second")]) == 0
    assert main(["patch", "export", str(tmp_path / "second")]) == 0
    assert f"line 9.9: 2 patches\n  {GOOD.name}: " in capsys.readouterr().out
    assert main(["patch", "checkout", str(work.folder)]) == UsageError.exit_code
