"""Nothing half-written, one writer at a time, disk checked first, commands told and checked."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TextIO, cast

import pytest

from vllm_forge.host import (
    RecordingRunner,
    Runner,
    atomic_path,
    cache_root,
    exclusive,
    files,
    head_commit,
    report,
    require_disk,
    which,
)
from vllm_forge.host.errors import (
    BusyError,
    CacheError,
    CommandFailedError,
    DiskSpaceError,
    ToolMissingError,
)
from vllm_forge.host.files import free_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- atomic_path ---------------------------------------------------------------------------------


def test_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "folder" / "file"
    with atomic_path(final) as aside:
        aside.write_text("new")
        assert not final.exists()
        assert aside.name == final.name
        assert aside.parent.parent == final.parent  # same file system: rename is enough
    assert final.read_text() == "new"
    assert names(final.parent) == ["file"]


def test_file_replaces_file(tmp_path: Path) -> None:
    final = tmp_path / "file"
    final.write_text("old")
    with atomic_path(final) as aside:
        aside.write_text("new")
        assert final.read_text() == "old"
    assert final.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_folder_replaces_folder(tmp_path: Path) -> None:
    final = tmp_path / "folder"
    (final / "sub").mkdir(parents=True)
    (final / "sub" / "old").touch()
    with atomic_path(final) as aside:
        aside.mkdir()
        (aside / "new").touch()
        assert names(final) == ["sub"]
    assert names(final) == ["new"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", ["nothing", "file", "folder"])
def test_exception_leaves_what_was_there(
    tmp_path: Path, kind: type[BaseException], old: str
) -> None:
    final = tmp_path / "final"
    if old == "file":
        final.write_text("old")
    elif old == "folder":
        final.mkdir()
        (final / "old").touch()
    with pytest.raises(kind), atomic_path(final) as aside:
        aside.mkdir()
        (aside / "half").touch()
        raise kind("stop")
    assert names(tmp_path) == ([] if old == "nothing" else ["final"])
    if old == "folder":
        assert names(final) == ["old"]


def test_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "final").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "final"):
        pass
    assert (tmp_path / "final").read_text() == "old"
    assert names(tmp_path) == ["final"]


WRITE_AND_WAIT = """
import sys, pathlib
from vllm_forge.host import atomic_path
with atomic_path(pathlib.Path(sys.argv[1])) as aside:
    aside.mkdir()
    (aside / "half").touch()
    print("half", flush=True)
    sys.stdin.read()
"""


@contextmanager
def child(code: str, *arguments: str, says: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that has said its first line."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first
            assert says in first
            yield process
        finally:
            process.kill()


def test_killed_writer_changes_nothing_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / "old").touch()
    with child(WRITE_AND_WAIT, str(final)) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert names(final) == ["old"]
    assert len(names(tmp_path)) == 2
    with atomic_path(final) as aside:
        aside.mkdir()
    assert names(tmp_path) == ["final"]
    assert names(final) == []


def test_stale_leftovers_of_any_kind_are_removed(tmp_path: Path) -> None:
    for name in ("12345678", "abcdefgh"):
        (tmp_path / f".tmp-final-{name}" / "final" / "deep").mkdir(parents=True)
    with atomic_path(tmp_path / "final") as aside:
        aside.touch()
    assert names(tmp_path) == ["final"]


def test_a_writer_leaves_the_one_with_a_longer_name_alone(tmp_path: Path) -> None:
    """``b300`` and ``b300-mtp`` may be written at the same time."""
    with atomic_path(tmp_path / "b300-mtp") as longer:
        longer.write_text("longer")
        with atomic_path(tmp_path / "b300") as shorter:
            shorter.write_text("shorter")
    assert names(tmp_path) == ["b300", "b300-mtp"]


def test_name_with_pattern_characters(tmp_path: Path) -> None:
    (tmp_path / ".tmp-x1-12345678").mkdir()
    (tmp_path / ".tmp-x[1]-12345678").mkdir()
    with atomic_path(tmp_path / "x[1]") as aside:
        aside.touch()
    assert names(tmp_path) == [".tmp-x1-12345678", "x[1]"]


# --- cache_root ----------------------------------------------------------------------------------


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / "own" / ".." / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "mine"
    monkeypatch.setenv("VLLM_FORGE_CACHE", "~/forge")
    assert cache_root() == tmp_path / "home" / "forge"
    monkeypatch.delenv("VLLM_FORGE_CACHE")
    assert cache_root() == tmp_path / "xdg" / "vllm-forge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == tmp_path / "home" / ".cache" / "vllm-forge"
    monkeypatch.setenv("VLLM_FORGE_CACHE", "~no-such-user/forge")
    with pytest.raises(CacheError, match="home directory"):
        cache_root()


# --- exclusive -----------------------------------------------------------------------------------

HOLD = """
import sys
from vllm_forge.host import exclusive
with exclusive("thing", wait=False):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_process_learns_who_is_first(cache: Path) -> None:
    with exclusive("thing", wait=False):
        pass  # leaves its own number in the file
    with child(HOLD) as first:
        with pytest.raises(BusyError) as refused, exclusive("thing", wait=False):
            pass
        assert f"process {first.pid}" in str(refused.value)
        assert refused.value.where == str(cache / "locks" / "thing.lock")
        with exclusive("another", wait=False):
            pass
    with exclusive("thing", wait=False):
        pass


def test_first_process_is_named() -> None:
    with exclusive("thing", wait=False):
        done = subprocess.run(
            [sys.executable, "-c", HOLD], capture_output=True, text=True, input="", check=False
        )
    assert done.returncode == 1
    assert f"is being worked on by process {os.getpid()}" in done.stderr


def test_lock_of_a_killed_process_is_free() -> None:
    with child(HOLD) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
    with exclusive("thing", wait=False):
        pass


def test_lock_is_free_after_an_exception() -> None:
    with pytest.raises(ValueError, match="stop"), exclusive("thing", wait=False):
        raise ValueError("stop")
    with exclusive("thing", wait=False):
        pass


def test_lock_that_another_process_makes_is_not_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may make and take the lock between a look at its path and a deletion."""
    monkeypatch.setattr(files, "remove", lambda path: pytest.fail(f"deleted {path}"))
    with exclusive("thing", wait=False):
        pass


def test_lock_that_was_replaced_is_taken_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its opening and its locking; a third process finds the new file."""
    path, lock, calls = cache / "locks" / "thing.lock", files._lock, []

    def replaced(*args: Any, **options: Any) -> None:
        lock(*args, **options)
        calls.append(args)
        if len(calls) == 1:
            path.unlink()
            path.touch()

    monkeypatch.setattr(files, "_lock", replaced)
    taken = pytest.raises(BlockingIOError)
    with exclusive("thing", wait=False), path.open() as third, taken:
        fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert len(calls) == 2


ASK = """
import fcntl
real = fcntl.flock

def flock(file, how):
    if not how & fcntl.LOCK_NB:
        print("waits", flush=True)
    real(file, how)

fcntl.flock = flock
"""


def test_waiting_ends_when_the_first_one_does() -> None:
    wait = ASK + HOLD.replace("wait=False", "wait=True")
    with child(HOLD) as first, child(wait, says="waits") as waiter:
        assert first.stdin is not None
        first.stdin.close()
        said, _ = waiter.communicate(timeout=30)
        assert said == "held\n"
        assert waiter.returncode == 0


# --- disk ----------------------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten GiB are free."""

    def usage(path: Any) -> Any:
        assert Path(path).exists()
        return shutil._ntuple_diskusage(100 << 30, 90 << 30, 10 << 30)

    monkeypatch.setattr(shutil, "disk_usage", usage)


@pytest.mark.usefixtures("free")
class TestDisk:
    def test_enough(self, tmp_path: Path) -> None:
        require_disk(tmp_path, 10 << 30)

    def test_not_enough(self, tmp_path: Path) -> None:
        with pytest.raises(DiskSpaceError) as refused:
            require_disk(tmp_path / "not" / "yet" / "there", (10 << 30) + 1)
        assert "10.0 GiB are free" in str(refused.value)
        assert str(tmp_path / "not" / "yet" / "there") in refused.value.where
        assert "VLLM_FORGE_CACHE" in refused.value.remedy

    def test_relative_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert free_bytes(Path("dist/image")) == 10 << 30
        require_disk(Path("dist"), 1)


# --- commands ------------------------------------------------------------------------------------


def test_output_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    runner = Runner()
    assert runner.run(["sh", "-c", "echo out; echo err >&2"]) == "out\n"
    assert runner.commands == [["sh", "-c", "echo out; echo err >&2"]]
    assert "$ sh -c 'echo out; echo err >&2'" in capsys.readouterr().err


def test_environment_and_folder(tmp_path: Path) -> None:
    runner = Runner()
    said = runner.run(["sh", "-c", "pwd; echo $A$PATH"], env={"A": "x:"}, cwd=tmp_path)
    assert said == f"{tmp_path}\nx:{os.environ['PATH']}\n"


def test_failing_command_shows_its_last_words() -> None:
    script = "seq 1 100; echo the reason >&2; exit 3"
    with pytest.raises(CommandFailedError) as refused:
        Runner().run(["sh", "-c", script])
    said = str(refused.value)
    assert "sh exited with 3" in said
    assert "the reason" in said
    assert "\n99\n" in said
    assert "\n50\n" not in said
    assert refused.value.where == f"sh -c '{script}'"


def test_command_that_a_signal_ends_has_failed() -> None:
    with pytest.raises(CommandFailedError, match="-9"):
        Runner().run(["sh", "-c", "kill -9 $$"])


def test_command_does_not_read_our_input() -> None:
    assert Runner().run(["cat"]) == ""


def test_command_that_writes_bytes() -> None:
    assert Runner().run(["printf", r"\377ok"]).endswith("ok")


def test_missing_command() -> None:
    with pytest.raises(ToolMissingError, match="no-such-tool-here") as refused:
        Runner().run(["no-such-tool-here", "--x"])
    assert refused.value.where == "no-such-tool-here --x"


def test_markup_in_a_command_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Runner().run(["echo", "[bold]", "[/nothing]"])
    assert "echo '[bold]' '[/nothing]'" in capsys.readouterr().err


def test_markup_in_a_step_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with report("step [red] one [/nothing]"):
        Runner().act("write [bold] to [/x]", lambda: None)
    said = capsys.readouterr().err
    assert said.count("step [red] one [/nothing]") == 2
    assert "write [bold] to [/x]" in said


def test_recording_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = RecordingRunner()
    assert runner.run(["touch", str(tmp_path / "a file")]) == ""
    runner.act("write another", (tmp_path / "b").touch)
    assert names(tmp_path) == []
    assert runner.commands == [["touch", str(tmp_path / "a file")]]
    assert capsys.readouterr().out == f"touch '{tmp_path}/a file'\n# write another\n"


def test_sbin_is_searched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "a-tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert which("a-tool") == str(tool)
    assert which("ldconfig") == shutil.which("ldconfig", path="/usr/sbin:/sbin")
    tool.chmod(0o644)
    assert which("a-tool") is None


def test_recorded_lines_of_two_threads_stay_whole() -> None:
    """print() writes its newline on its own, so two threads' lines can end up on one."""
    writes: list[str] = []
    out = SimpleNamespace(write=writes.append)
    runner = RecordingRunner()
    with redirect_stdout(cast("TextIO", out)):
        runner.run(["echo", "a b"])
        runner.act("a step", lambda: None)
    assert writes == ["echo 'a b'\n", "# a step\n"]


def test_commit_is_of_the_checkout_whatever_git_is_set_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook has GIT_DIR of its repository; a source file that is not shown is one all the same."""
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        commit = ["-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--allow-empty"]
        for argv in (["init", "--quiet"], [*commit, "--quiet", f"--message={name}"]):
            subprocess.run(["git", *argv], cwd=tmp_path / name, check=True)
    (settings := tmp_path / "settings").write_text("[status]\nshowUntrackedFiles = no\n")
    (tmp_path / "mine" / "new.py").touch()
    head = head_commit(tmp_path / "mine")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert head_commit(tmp_path / "mine") == head
    assert head[1] == ["new.py"]
