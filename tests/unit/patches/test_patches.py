"""Every way a patch can be wrong has its own error, and none of them changes a thing.

The patches are in ``tests/fixtures/patches``: two good ones for the tree in ``source/``, and in
``broken/`` the first one, broken in one way each.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.index_server import IndexServer
from tests.support.series import BROKEN, FIXTURES, GOOD, RELEASE, SDIST, SECOND, source_files
from tests.support.trees import changed_tree, patch_text, unchanged, write_sdist
from vllm_forge.cli import main
from vllm_forge.errors import ForgeError
from vllm_forge.matrix import load
from vllm_forge.patches import (
    apply_series,
    check_line,
    read_patch,
    read_series,
    read_tree_lock,
    update_line,
)
from vllm_forge.patches.apply import FIELDS
from vllm_forge.patches.errors import (
    AlreadyUpstreamError,
    AppliedTwiceError,
    CorruptPatchError,
    EmptyPatchError,
    LineEndingError,
    NonCanonicalPatchError,
    OffsetError,
    PatchHeaderError,
    SeriesFileError,
    TreeMismatchError,
    WheelSourceError,
    WrongBaseError,
    WrongContextError,
)
from vllm_forge.sources import Index, SourceRepo
from vllm_forge.sources.errors import HashMismatchError, LockFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_forge.project import Project


def refuse(repo: SourceRepo, base: str, paths: Sequence[Path], kind: type[ForgeError]) -> str:
    """Read and apply; the error must be exactly of the class, and nothing may have changed."""
    contents = [path.read_bytes() for path in paths]
    with unchanged(repo, base), pytest.raises(kind) as refused:
        apply_series(repo, base, [read_patch(path) for path in paths])
    assert type(refused.value) is kind
    assert [path.read_bytes() for path in paths] == contents
    assert paths[-1].name in str(refused.value)
    return str(refused.value)


# --- what is right -------------------------------------------------------------------------------


def test_good_patches_apply_and_compose(repo: SourceRepo, base: str, tmp_path: Path) -> None:
    patches = [read_patch(GOOD), read_patch(SECOND)]
    with unchanged(repo, base):
        applied = apply_series(repo, base, patches)
    assert applied.base == base
    first, second = applied.trees
    assert applied.result == second
    shown = repo.git("cat-file", "blob", f"{first}:vllm/scheduler.py").stdout
    assert b"room = max(0, " in shown
    files = {
        name: repo.git("cat-file", "blob", f"{second}:{name}").stdout for name in source_files()
    }
    assert changed_tree(repo, base, dict(files), tmp_path / "index") == second


def test_order_of_patches_of_different_files_gives_one_tree(repo: SourceRepo, base: str) -> None:
    one, two = read_patch(GOOD), read_patch(SECOND)
    assert (
        apply_series(repo, base, [one, two]).result == apply_series(repo, base, [two, one]).result
    )


def test_empty_series_is_the_base(repo: SourceRepo, base: str) -> None:
    applied = apply_series(repo, base, [])
    assert (applied.result, applied.trees) == (base, ())


def test_fields_of_a_patch() -> None:
    patch = read_patch(GOOD)
    assert patch.name == "0001-good.patch"
    assert patch.summary == "room is never negative, and what runs counts"
    assert patch.fields["Description"].count("\n") == 1
    assert patch.files == ("vllm/scheduler.py",)
    assert patch.proves == "tests/unit/test_nothing.py::test_nothing"
    assert tuple(patch.fields) == FIELDS


def test_patch_can_add_delete_and_end_without_newline(
    repo: SourceRepo, base: str, tmp_path: Path
) -> None:
    changes = {
        "vllm/new.py": b"one\ntwo",
        "vllm/cache.py": None,
        "README.md": b"caf\xc3\xa9\n",
    }
    path = tmp_path / "p.patch"
    path.write_text(patch_text(repo, base, changes, tmp_path / "index"), encoding="utf-8")
    applied = apply_series(repo, base, [read_patch(path)])
    assert applied.result == changed_tree(repo, base, changes, tmp_path / "index")


# --- patches on disk that are broken in one way --------------------------------------------------

KINDS: dict[str, type[ForgeError]] = {
    "already-upstream": AlreadyUpstreamError,
    "corrupt-counts": CorruptPatchError,
    "corrupt-line": CorruptPatchError,
    "empty": EmptyPatchError,
    "existing-file": WrongContextError,
    "function-missing": NonCanonicalPatchError,
    "fuzzy-context": WrongContextError,
    "git-mail": NonCanonicalPatchError,
    "hunks-swapped": NonCanonicalPatchError,
    "less-context": NonCanonicalPatchError,
    "no-hunk": EmptyPatchError,
    "no-index": NonCanonicalPatchError,
    "no-prefix": WrongContextError,
    "no-such-file": WrongContextError,
    "one-hunk-twice": WrongContextError,
    "shifted": OffsetError,
    "shifted-second": OffsetError,
    "short-index": NonCanonicalPatchError,
    "signature": NonCanonicalPatchError,
    "trailing-blank": NonCanonicalPatchError,
}
# These need a patch before them.
AFTER_GOOD: dict[str, type[ForgeError]] = {"same-change-other-name": AppliedTwiceError}


def test_every_broken_fixture_is_in_the_table() -> None:
    assert {path.stem for path in BROKEN.iterdir()} == set(KINDS) | set(AFTER_GOOD)


@pytest.mark.parametrize("name", KINDS)
def test_broken_patch(name: str, repo: SourceRepo, base: str) -> None:
    refuse(repo, base, [BROKEN / f"{name}.patch"], KINDS[name])


@pytest.mark.parametrize("name", KINDS | AFTER_GOOD)
def test_broken_patch_after_a_good_one(name: str, repo: SourceRepo, base: str) -> None:
    """A patch that was taken before the broken one must not stay in the tree either."""
    path = BROKEN / f"{name}.patch"
    if name in AFTER_GOOD:
        refuse(repo, base, [GOOD, path], AFTER_GOOD[name])
    else:
        refuse(repo, base, [SECOND, path], KINDS[name])


def diff_of(path: Path) -> str:
    return path.read_text().partition("\n---\n")[2]


@pytest.mark.parametrize("name", ["fuzzy-context", "shifted"])
def test_gnu_patch_would_take_it(name: str, tmp_path: Path, repo: SourceRepo, base: str) -> None:
    """Why fuzz and offsets are refused: the usual tool applies such a patch and exits with 0."""
    if shutil.which("patch") is None:
        pytest.skip("GNU patch is not installed; that we refuse it is tested above")
    tree = tmp_path / "tree"
    shutil.copytree(FIXTURES / "source", tree)
    before = (tree / "vllm" / "scheduler.py").read_bytes()
    done = subprocess.run(
        ["patch", "-p1"], cwd=tree, input=diff_of(BROKEN / f"{name}.patch"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert re.search(r"with fuzz|offset -4 lines", done.stdout)
    assert (tree / "vllm" / "scheduler.py").read_bytes() != before


def test_wrong_context_names_file_and_line(repo: SourceRepo, base: str) -> None:
    said = refuse(repo, base, [BROKEN / "fuzzy-context.patch"], WrongContextError)
    (where,) = [row for row in said.splitlines() if row.startswith("  where: ")]
    assert "vllm/scheduler.py:15 (from " in where
    assert "patch failed" in said.splitlines()[0]


def test_offset_names_hunk_and_distance(repo: SourceRepo, base: str) -> None:
    said = refuse(repo, base, [BROKEN / "shifted-second.patch"], OffsetError)
    assert "hunk 2 applies at line 25, -4 lines from where it says" in said


def test_base_is_another_release(repo: SourceRepo, tmp_path: Path) -> None:
    """The line that the patch changes is another one there."""
    other = source_files()
    other["vllm/scheduler.py"] = other["vllm/scheduler.py"].replace(b"self.limit - len", b"9 - len")
    base = repo.import_archive("9.9.2", write_sdist(tmp_path / "b.tar.gz", other))
    refuse(repo, base, [GOOD], WrongContextError)


def test_base_with_the_change_one_line_lower(repo: SourceRepo, tmp_path: Path) -> None:
    other = source_files()
    other["vllm/scheduler.py"] = b"# one more line\n" + other["vllm/scheduler.py"]
    base = repo.import_archive("9.9.2", write_sdist(tmp_path / "b.tar.gz", other))
    refuse(repo, base, [GOOD], OffsetError)


def test_half_of_it_is_upstream(repo: SourceRepo, base: str, tmp_path: Path) -> None:
    """Not AlreadyUpstream: the other half would be lost."""
    half = source_files()["vllm/scheduler.py"].replace(
        b"room = self.limit - len(self.running)", b"room = max(0, self.limit - len(self.running))"
    )
    other = changed_tree(repo, base, {"vllm/scheduler.py": half}, tmp_path / "index")
    refuse(repo, other, [GOOD], WrongContextError)


def test_upstream_has_it(repo: SourceRepo, base: str) -> None:
    upstream = apply_series(repo, base, [read_patch(GOOD)]).result
    said = refuse(repo, upstream, [GOOD], AlreadyUpstreamError)
    assert "retired" in said


def test_patch_that_undoes_an_earlier_one_is_not_called_twice(
    repo: SourceRepo, base: str, tmp_path: Path
) -> None:
    after = apply_series(repo, base, [read_patch(GOOD)]).result
    path = tmp_path / "undo.patch"
    scheduler = {"vllm/scheduler.py": source_files()["vllm/scheduler.py"]}
    path.write_text(patch_text(repo, after, scheduler, tmp_path / "index"))
    assert apply_series(repo, base, [read_patch(GOOD), read_patch(path)]).result == base


# --- broken in a way that is easier said than shown ----------------------------------------------


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Callable[[bytes], bytes]], Path]:
    def write(edit: Callable[[bytes], bytes]) -> Path:
        path = tmp_path / "edited.patch"
        content = edit(GOOD.read_bytes())
        assert content != GOOD.read_bytes()
        path.write_bytes(content)
        return path

    return write


def line(pattern: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: re.sub(pattern, new, content, count=1, flags=re.M)


def new_file(path: bytes) -> Callable[[bytes], bytes]:
    diff = (
        b"diff --git a/%b b/%b\nnew file mode 100644\n--- /dev/null\n+++ b/%b\n@@ -0,0 +1 @@\n+x\n"
    )
    return lambda content: content.partition(b"diff --git")[0] + diff % (path, path, path)


EDITS: dict[str, tuple[Callable[[bytes], bytes], type[ForgeError]]] = {
    "crlf": (lambda c: c.replace(b"\n", b"\r\n"), LineEndingError),
    "crlf-in-one-line": (line(rb"^(\+.*max.*)$", rb"\1\r"), LineEndingError),
    "no-final-newline": (lambda c: c.rstrip(b"\n"), CorruptPatchError),
    "not-utf-8": (line(rb"max\(", b"max(\xe9"), CorruptPatchError),
    "nul": (line(rb"max\(", b"max(\0"), NonCanonicalPatchError),
    "other-result": (line(rb"max\(0", b"max(1"), NonCanonicalPatchError),
    "trailing-blank-added": (line(rb"^(\+.*max.*)$", rb"\1 "), NonCanonicalPatchError),
    "extra-blank-context": (line(rb"^ $\n", b"\n"), NonCanonicalPatchError),
    "hunk-cut-off": (lambda c: c[: c.rindex(b" def drain")], CorruptPatchError),
    "no-diff-line": (line(rb"^diff --git.*\n", b""), PatchHeaderError),
    "no-separator": (line(rb"^---\n", b""), PatchHeaderError),
    "text-before-the-diff": (line(rb"^---\n", b"---\nhello\n"), PatchHeaderError),
    "blank-after-separator": (line(rb"^---\n", b"---\n\n"), PatchHeaderError),
    "no-header": (lambda c: c.partition(b"---\n")[2], PatchHeaderError),
    "unknown-field": (line(rb"^Skus:", b"Sku:"), PatchHeaderError),
    "field-in-small-letters": (line(rb"^Skus:", b"skus:"), PatchHeaderError),
    "missing-field": (line(rb"^Drop-When: .*\n", b""), PatchHeaderError),
    "doubled-field": (line(rb"^(Skus: .*\n)", rb"\1\1"), PatchHeaderError),
    "empty-field": (line(rb"^Skus: .*$", b"Skus: "), PatchHeaderError),
    "no-colon": (line(rb"^Skus: ", b"Skus "), PatchHeaderError),
    "blank-header-line": (line(rb"^Skus:", b"\nSkus:"), PatchHeaderError),
    "continued-before-any-field": (lambda c: b" x\n" + c, PatchHeaderError),
    "bad-date": (line(rb"^Last-Update: .*$", b"Last-Update: 24 Nov 2026"), PatchHeaderError),
    "bad-proof": (line(rb"^Proves: .*$", b"Proves: it works"), PatchHeaderError),
    "proof-outside": (line(rb"^Proves: .*$", b"Proves: ../x.py::test_x"), PatchHeaderError),
    "order": (line(rb"^(Skus: .*\n)(Proves: .*\n)", rb"\2\1"), NonCanonicalPatchError),
    "renamed-outside": (lambda c: c.replace(b"b/vllm/", b"b/../"), ForgeError),
    **{
        f"new-{path.decode()}": (new_file(path), CorruptPatchError)
        for path in (b"../x.py", b"/etc/x", b".git/config", b"vllm/scheduler.py/x")
    },
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_patch(name: str, repo: SourceRepo, base: str, edited: Callable[..., Path]) -> None:
    edit, kind = EDITS[name]
    path = edited(edit)
    if kind is ForgeError:
        with unchanged(repo, base), pytest.raises(ForgeError):
            apply_series(repo, base, [read_patch(path)])
    else:
        refuse(repo, base, [path], kind)


def test_header_fault_is_named_with_its_line(edited: Callable[..., Path]) -> None:
    path = edited(line(rb"^Skus:", b"Sku:"))
    with pytest.raises(PatchHeaderError, match="'Sku'") as refused:
        read_patch(path)
    number = 1 + path.read_text().splitlines().index("Sku: all")
    assert refused.value.where == f"{path}:{number}"


def test_three_dashes_in_the_description_are_text(edited: Callable[..., Path]) -> None:
    patch = read_patch(edited(line(rb"(^Description: .*)$", rb"\1 ---")))
    assert patch.summary.endswith(" ---")


def test_tree_with_bytes_that_are_not_utf8(repo: SourceRepo, tmp_path: Path) -> None:
    """Context lines that a patch file, which is UTF-8, cannot hold: refused, not a crash."""
    before = b"caf\xe9\n" + b"".join(b"%d\n" % n for n in range(9))
    base = repo.import_archive("1.0", write_sdist(tmp_path / "a.tar.gz", {"vllm/a.py": before}))
    after = before.replace(b"2\n", b"two\n")
    text = patch_text(repo, base, {"vllm/a.py": after}, tmp_path / "index")
    assert "\ufffd" in text
    lines = text.replace("@@ -1,7 +1,7 @@", "@@ -2,6 +2,6 @@").splitlines(keepends=True)
    path = tmp_path / "p.patch"
    path.write_text("".join(row for row in lines if "\ufffd" not in row), encoding="utf-8")
    with unchanged(repo, base), pytest.raises(NonCanonicalPatchError):
        apply_series(repo, base, [read_patch(path)])


# --- the series ----------------------------------------------------------------------------------


def test_series_is_read_in_its_order(series: Path) -> None:
    assert [patch.name for patch in read_series(series)] == [GOOD.name, SECOND.name]
    (series / "series").write_text(f"{SECOND.name}\n{GOOD.name}\n")
    assert [patch.name for patch in read_series(series)] == [SECOND.name, GOOD.name]


def test_series_may_be_empty(series: Path) -> None:
    for path in series.glob("*.patch"):
        path.unlink()
    (series / "series").write_text("# nothing to carry\n")
    assert read_series(series) == ()


def folder_for_a_patch(series: Path) -> None:
    (series / SECOND.name).unlink()
    (series / SECOND.name).mkdir()


SERIES: dict[str, tuple[Callable[[Path], object], type[ForgeError], str]] = {
    "no-series-file": (lambda f: (f / "series").unlink(), SeriesFileError, "no series file"),
    "listed-but-missing": (lambda f: (f / SECOND.name).unlink(), SeriesFileError, SECOND.name),
    "listed-with-another-case": (
        lambda f: (f / "series").write_text(f"{GOOD.name}\n{SECOND.name.upper()}\n"),
        SeriesFileError, SECOND.name.upper(),
    ),
    "present-but-unlisted": (
        lambda f: (f / "series").write_text(f"{GOOD.name}\n"), SeriesFileError, SECOND.name,
    ),
    "commented-out": (
        lambda f: (f / "series").write_text(f"{GOOD.name}\n#{SECOND.name}\n"),
        SeriesFileError, SECOND.name,
    ),
    "unlisted-diff": (
        lambda f: (f / "extra.diff").write_text("x"), SeriesFileError, "extra.diff",
    ),
    "listed-twice": (
        lambda f: (f / "series").write_text(f"{GOOD.name}\n{SECOND.name}\n{GOOD.name}\n"),
        AppliedTwiceError, GOOD.name,
    ),
    "a-folder": (
        folder_for_a_patch,
        SeriesFileError, SECOND.name,
    ),
    "not-utf-8": (
        lambda f: (f / "series").write_bytes(b"\xff\n"), SeriesFileError, "\ufffd",
    ),
    "one-is-broken": (
        lambda f: shutil.copy(BROKEN / "corrupt-line.patch", f / SECOND.name),
        CorruptPatchError, SECOND.name,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SERIES)
def test_broken_series(name: str, series: Path) -> None:
    change, kind, words = SERIES[name]
    change(series)
    before = {path: path.read_bytes() for path in series.iterdir() if path.is_file()}
    with pytest.raises(kind) as refused:
        read_series(series)
    assert type(refused.value) is kind
    assert words in str(refused.value)
    assert {path: path.read_bytes() for path in series.iterdir() if path.is_file()} == before


# --- the tree lock -------------------------------------------------------------------------------


def test_updated_lock_is_what_is_checked(
    project: Project, repo: SourceRepo, base: str, series: Path
) -> None:
    lock = read_tree_lock(series, "9.9")
    applied = check_line(project, "9.9", repo)
    assert (lock.base, lock.result) == (base, applied.result)
    assert applied.base == base


def test_series_that_no_wheel_can_have_gets_no_lock(
    project: Project, repo: SourceRepo, series: Path, tmp_path: Path
) -> None:
    """It would be found when the wheel is built, or proven."""
    tree = check_line(project, "9.9", repo).result
    text = patch_text(repo, tree, {"setup.py": b"x = 1\n"}, tmp_path / "index")
    (series / "0003-setup.patch").write_text(text, encoding="utf-8")
    with (series / "series").open("a") as file:
        file.write("0003-setup.patch\n")
    before = (series / "lock.toml").read_bytes()
    with pytest.raises(WheelSourceError, match=r"A setup\.py"):
        update_line(project, "9.9", repo)
    assert (series / "lock.toml").read_bytes() == before
    changed = changed_tree(repo, tree, {"setup.py": b"x = 1\n"}, tmp_path / "index")
    (series / "lock.toml").write_text(before.decode().replace(tree, changed))
    with pytest.raises(WheelSourceError, match=r"A setup\.py"):
        check_line(project, "9.9", repo)


def test_check_needs_no_index_when_the_source_is_here(
    project: Project, repo: SourceRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_index() -> Index:
        raise AssertionError("an index was made")

    monkeypatch.setattr("vllm_forge.patches.series.Index", no_index)
    check_line(project, "9.9", repo)


def test_check_on_a_fresh_host(
    project: Project, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / "fresh"))
    monkeypatch.setattr("vllm_forge.patches.series.Index", lambda: index)
    assert check_line(project, "9.9", SourceRepo()).result


def test_republished_source_archive_is_refused(
    project: Project, server: IndexServer, index: Index, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Same name and size, other bytes."""
    served = server.projects["vllm"][SDIST]
    served.content = served.content[:-1] + bytes([served.content[-1] ^ 1])
    monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / "fresh"))
    monkeypatch.setattr("vllm_forge.patches.series.Index", lambda: index)
    fresh = SourceRepo()
    with pytest.raises(HashMismatchError):
        check_line(project, "9.9", fresh)
    assert fresh.tree(RELEASE) is None


def set_field(name: str, value: str) -> Callable[[str], str]:
    return lambda text: re.sub(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.M)


HEX = '"' + "ab" * 20 + '"'
LOCKS: dict[str, tuple[Callable[[str], str], type[ForgeError]]] = {
    "other-base": (set_field("base", HEX), WrongBaseError),
    "other-result": (set_field("result", HEX), TreeMismatchError),
    "no-result": (lambda text: re.sub(r"^result.*\n", "", text, flags=re.M), LockFileError),
    "extra-field": (lambda text: text + "more = 1\n", LockFileError),
    "not-toml": (lambda text: text + "<<<<<<< ours\n", LockFileError),
    "number-for-hash": (set_field("result", "5"), LockFileError),
    "text-for-size": (set_field("size", '"5"'), LockFileError),
    "not-utf-8": (lambda text: text + "# \udcff\n", LockFileError),
}


@pytest.mark.parametrize("name", LOCKS)
def test_broken_tree_lock(
    name: str, project: Project, repo: SourceRepo, base: str, series: Path
) -> None:
    change, kind = LOCKS[name]
    path = series / "lock.toml"
    path.write_bytes(change(path.read_text()).encode(errors="surrogateescape"))
    with unchanged(repo, base), pytest.raises(kind) as refused:
        check_line(project, "9.9", repo)
    assert type(refused.value) is kind


def test_no_tree_lock(project: Project, repo: SourceRepo, series: Path) -> None:
    (series / "lock.toml").unlink()
    with pytest.raises(LockFileError, match="missing tree lock") as refused:
        check_line(project, "9.9", repo)
    assert "patch lock" in refused.value.remedy


def test_patch_that_is_left_out_changes_the_tree(
    project: Project, repo: SourceRepo, series: Path
) -> None:
    (series / "series").write_text(f"{GOOD.name}\n")
    (series / SECOND.name).unlink()
    with pytest.raises(TreeMismatchError):
        check_line(project, "9.9", repo)


def test_failed_update_leaves_the_old_lock(
    project: Project, repo: SourceRepo, index: Index, series: Path
) -> None:
    before = (series / "lock.toml").read_bytes()
    shutil.copy(BROKEN / "shifted.patch", series / GOOD.name)
    with pytest.raises(OffsetError):
        update_line(project, "9.9", repo)
    assert (series / "lock.toml").read_bytes() == before


def test_command_returns_the_code_of_a_broken_series(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root / "patches", copy / "patches")
    shutil.copy(root / "matrix.toml", copy)
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(copy))
    (copy / load(root).line["0.26"].series / "forgotten.patch").write_text("x")
    assert main(["patch", "check", "--line", "0.26"]) == SeriesFileError.exit_code
