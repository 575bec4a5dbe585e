"""The quantization tools' environment: its lock, its patches, and that it is made once."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vllm_forge.checkpoints.errors import ToolEnvironmentError
from vllm_forge.checkpoints.quantize import environment
from vllm_forge.checkpoints.quantize.environment import FOLDER, INPUT, LOCK, SERIES, enter, prepare
from vllm_forge.patches import read_series
from vllm_forge.patches.errors import (
    AlreadyUpstreamError,
    OffsetError,
    WrongBaseError,
    WrongContextError,
)
from vllm_forge.patches.wheel import patch_installed
from vllm_forge.project import Project
from vllm_forge.sources.errors import LockFileError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_forge.patches import Patch

DIFF = """\
diff --git a/src/pkg/module.py b/src/pkg/module.py
index {before}..{after} 100644
--- a/src/pkg/module.py
+++ b/src/pkg/module.py
@@ -2,7 +2,7 @@ zero
 a
 b
 c
-two
+TWO
 d
 e
 f
"""
PRISTINE = "zero\na\nb\nc\ntwo\nd\ne\nf\ng\n"


@pytest.fixture
def patch(tmp_path: Path, root: Path) -> Patch:
    """A patch of one line, with the committed one's header."""
    from vllm_forge.patches.wheel import blob_hash

    (committed,) = read_series(root / SERIES)
    head = committed.path.read_text().partition("\n---\n")[0]
    hashes = {"before": PRISTINE, "after": PRISTINE.replace("two", "TWO")}
    diff = DIFF.format(**{name: blob_hash(text.encode()) for name, text in hashes.items()})
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "0001-x.patch").write_text(f"{head}\n---\n{diff}")
    (folder / "series").write_text("0001-x.patch\n")
    (made,) = read_series(folder)
    return made


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site-packages"
    (folder / "pkg").mkdir(parents=True)
    (folder / "pkg" / "module.py").write_text(PRISTINE)
    return folder


class TestPatchInstalled:
    def test_the_file_is_replaced_not_written_to(self, site: Path, patch: Patch) -> None:
        """uv's cache holds hard links of installed files."""
        path = site / "pkg" / "module.py"
        cached = site / "cached.py"
        cached.hardlink_to(path)
        assert patch_installed(site, [patch]) == [path]
        assert path.read_text() == PRISTINE.replace("two", "TWO")
        assert cached.read_text() == PRISTINE

    @pytest.mark.parametrize(
        ("content", "error"),
        [
            (PRISTINE.replace("two", "TWO"), AlreadyUpstreamError),
            (PRISTINE.replace("two", "2"), WrongContextError),
            ("more\n" + PRISTINE, OffsetError),
        ],
    )
    def test_another_file_is_refused_and_stays(
        self, site: Path, patch: Patch, content: str, error: type[Exception]
    ) -> None:
        path = site / "pkg" / "module.py"
        path.write_text(content)
        with pytest.raises(error):
            patch_installed(site, [patch])
        assert path.read_text() == content

    def test_a_file_that_is_not_there_is_named(self, site: Path, patch: Patch) -> None:
        (site / "pkg" / "module.py").unlink()
        with pytest.raises(WrongBaseError, match="which is not installed"):
            patch_installed(site, [patch])


class TestCommitted:
    def test_the_lock_is_current(self, root: Path) -> None:
        environment._check_lock(Project(root))

    def test_the_lock_names_no_place_and_hashes_everything(self, root: Path) -> None:
        text = (root / LOCK).read_text()
        assert "://" not in text
        rows = [row for row in text.splitlines() if "==" in row and not row.startswith("#")]
        assert all(row.endswith("\\") for row in rows)
        assert len(rows) > 60

    def test_the_series_is_for_the_locked_release(self, root: Path) -> None:
        assert f"transformers=={SERIES.name}." in (root / LOCK).read_text()
        (patch,) = read_series(root / SERIES)
        assert {Path(path).name for path in patch.files} == {
            "modeling_deepseek_v4.py",
            "modular_deepseek_v4.py",
        }


class TestPrepare:
    @pytest.mark.parametrize(
        ("edit", "said"),
        [
            (lambda f: (f / LOCK).unlink(), "have no lock"),
            (lambda f: _append(f / INPUT, "numpy\n"), "not made for what quantize.in now says"),
            (lambda f: _replace(f / "pyproject.toml", "rich>=13", "rich>=99"), "asks for rich>=99"),
            (lambda f: _replace(f / "pyproject.toml", "rich>=13", "richer>=13"), "has none"),
        ],
    )
    def test_a_stale_lock_is_refused(
        self, checkout: Path, edit: Callable[[Path], None], said: str
    ) -> None:
        edit(checkout)
        with pytest.raises(LockFileError, match=said) as caught:
            prepare(Project(checkout))
        assert caught.value.remedy == "run: nox -s lock -- --tools"
        assert not (checkout / ".nox").exists()

    def test_made_once_and_again_when_the_lock_changes(
        self, checkout: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = _fake_uv(checkout, monkeypatch)
        assert (
            prepare(Project(checkout))
            == prepare(Project(checkout))
            == checkout / ".nox/quantize/bin/python"
        )
        assert calls == ["venv", "install", "install", "patch"]
        _append(checkout / LOCK, "# another\n")
        prepare(Project(checkout))
        assert calls == ["venv", "install", "install", "patch"] * 2

    def test_moved_checkout_makes_its_own(
        self, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The project is installed from its folder, which is no longer there."""
        calls = _fake_uv(checkout, monkeypatch)
        prepare(Project(checkout))
        moved = checkout.rename(tmp_path / "moved")
        prepare(Project(moved))
        assert calls == ["venv", "install", "install", "patch"] * 2

    def test_half_made_is_made_again(self, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = _fake_uv(checkout, monkeypatch)
        with monkeypatch.context() as broken:
            broken.setattr(environment, "patch_installed", _fail)
            with pytest.raises(WrongContextError):
                prepare(Project(checkout))
        prepare(Project(checkout))
        assert calls == ["venv", "install", "install"] * 2 + ["patch"]

    def test_what_uv_says_is_in_the_message(
        self, checkout: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(environment, "find_uv_bin", lambda: "/bin/false")
        monkeypatch.setattr(environment, "require_disk", lambda path, need: None)
        with pytest.raises(ToolEnvironmentError, match="exited with 1"):
            prepare(Project(checkout))


class TestEnter:
    def test_enter_returns_inside_environment_behind_link(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "shared" / FOLDER
        folder.mkdir(parents=True)
        (tmp_path / "link").symlink_to(tmp_path / "shared")
        # Python does not resolve links in its prefix.
        monkeypatch.setattr(sys, "prefix", str(tmp_path / "link" / FOLDER))
        monkeypatch.setattr(environment, "prepare", lambda _: pytest.fail("prepared once more"))
        enter(Project(tmp_path / "link"), [])


def _fake_uv(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []

    def uv(*arguments: str, cwd: Path | None = None) -> str:
        calls.append("venv" if arguments[0] == "venv" else "install")
        if arguments[0] == "venv":
            folder = checkout / ".nox/quantize"
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "lib/python3.11/site-packages").mkdir(parents=True)
        return ""

    monkeypatch.setattr(environment, "_uv", uv)
    monkeypatch.setattr(environment, "index_url", lambda: "http://127.0.0.1/simple")
    monkeypatch.setattr(environment, "require_disk", lambda path, need: None)
    monkeypatch.setattr(environment, "patch_installed", lambda *_: calls.append("patch"))
    return calls


def _fail(*_: object) -> None:
    raise WrongContextError("it does not fit")


def _append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def _replace(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
