"""What a long step shows."""

from __future__ import annotations

import importlib
import io
import time

import pytest
from rich.markup import escape
from rich.table import Table

from vllm_forge.host import RecordingRunner, show
from vllm_forge.host.console import PlainConsole, progress_line, transfer_progress

module = importlib.import_module("vllm_forge.host.console")  # the package has a value of that name


def test_progress_line_has_bytes_speed_and_remaining_time() -> None:
    line = progress_line("download 33 files", 1_200_000_000, 3_800_000_000, 12.0)
    assert line == "  download 33 files: 1.2 of 3.8 GB, 100.0 MB/s, 26 s left"


def test_progress_line_without_a_byte_has_no_remaining_time() -> None:
    assert progress_line("x", 0, 10**9, 5.0) == "  x: 0.0 of 1.0 GB, 0.0 MB/s"


def test_console_writes_no_control_characters() -> None:
    out = io.StringIO()
    table = Table("name")
    table.add_row("\x1b[31mcell")
    text = "\x1b]0;title\a[bold]a\rb\udcff[/]\nnext"
    PlainConsole(file=out).print(text, escape("\x1b[x]"), table)
    assert r"\x1b]0;title\x07a\rb\udcff" in out.getvalue()
    assert "\nnext" in out.getvalue() and r"\x1b[x]" in out.getvalue()
    assert all(mark.isprintable() or mark == "\n" for mark in out.getvalue())


def test_results_have_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    show("dist/\x1b[31m\udcff")
    RecordingRunner().run(["cat", "dist/\x1b[31m\udcff"])
    assert capsys.readouterr().out == ("dist/\\x1b[31m\\udcff\ncat 'dist/\\x1b[31m\\udcff'\n")


def test_log_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 4.0, 11.0, 12.0, 25.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with transfer_progress("download", 4_000_000_000) as advance:
        for _ in range(4):
            advance(1_000_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "  download: 2.0 of 4.0 GB",
        "  download: 4.0 of 4.0 GB",
    ]


def test_second_transfer_at_a_time_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(module, "console", PlainConsole(force_terminal=True, file=out))
    monkeypatch.setattr(module, "PROGRESS_S", 0.0)
    with transfer_progress("wheels", 10) as wheels:
        with transfer_progress("packages", 10) as packages:
            packages(5)
        wheels(5)
    with transfer_progress("packages", 10) as packages:  # the bar is free again
        packages(5)
    shown = out.getvalue()
    assert shown.count("packages: 0.0 of 0.0 GB") == 1
