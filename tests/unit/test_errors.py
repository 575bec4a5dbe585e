"""One class, one exit code, and a message that says what, where and what to do."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

import pytest

import vllm_forge
from vllm_forge.cli import main
from vllm_forge.errors import ForgeError, UsageError
from vllm_forge.host.errors import FileAccessError
from vllm_forge.images.errors import BaseImageError
from vllm_forge.matrix.errors import (
    MatrixFileError,
    MatrixValueError,
    UnknownLineError,
    UnknownSkuError,
    UnsupportedCellError,
)

if TYPE_CHECKING:
    from pathlib import Path


for module in pkgutil.walk_packages(vllm_forge.__path__, "vllm_forge."):
    if module.name.endswith(".errors"):
        importlib.import_module(module.name)


def subclasses(kind: type[ForgeError]) -> list[type[ForgeError]]:
    found = [kind]
    for sub in kind.__subclasses__():
        found += subclasses(sub)
    return found


ALL = subclasses(ForgeError)


def test_every_class_lives_in_the_errors_module_of_its_room() -> None:
    assert len(ALL) > 40
    for kind in ALL:
        assert kind.__module__.endswith(".errors"), kind


def test_the_last_digit_of_an_exit_code_is_its_meaning() -> None:
    meanings = {"REFUSED": 0, "RED": 1, "UNDECIDED": 2, "FAULT": 3}
    for kind in set(ALL) - {ForgeError, UsageError}:
        names = vars(importlib.import_module(kind.__module__))
        values = {name: names[name] for name in meanings if name in names}
        assert kind.exit_code in values.values(), kind
        for name, value in values.items():
            assert value % 10 == meanings[name], kind.__module__


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
class TestEveryClass:
    def test_a_shell_can_see_the_code(self, kind: type[ForgeError]) -> None:
        # 0 is success; from 124 on, shells and timeout(1) give codes a meaning of their own.
        assert 0 < kind.exit_code < 124

    def test_docstring_says_what_it_is_for(self, kind: type[ForgeError]) -> None:
        assert vars(kind)["__doc__"].strip()

    def test_message_shows_what_where_and_remedy(self, kind: type[ForgeError]) -> None:
        text = str(kind("it broke", where="there:3", remedy="mend it"))
        assert text.splitlines() == ["it broke", "  where:  there:3", "  remedy: mend it"]

    def test_message_leaves_out_what_is_not_known(self, kind: type[ForgeError]) -> None:
        assert str(kind("it broke")) == "it broke"


# (arguments, exit code of the class, what the message must say)
CASES = {
    "unknown-sku": (["build", "b30"], UnknownSkuError, ["b30", "'b300'", "sm_103a"]),
    "unknown-line": (
        ["build", "b300", "--line", "0.27"],
        UnknownLineError,
        ["0.27", "did you mean '0.2", "0.33"],
    ),
    "unsupported-cell": (
        ["build", "sm120", "--line", "0.22"],
        UnsupportedCellError,
        ["rtxpro6000", "no sparse-MLA attention", "line.0.22.unsupported.rtxpro6000", "0.26, 0.33"],
    ),
    "mistyped-option": (
        ["build", "b300", "--dry-rum"],
        UsageError,
        ["--dry-rum", "did you mean '--dry-run'?"],
    ),
    "mistyped-option-with-value": (
        ["build", "b300", "--enginee=buildah"],
        UsageError,
        ["did you mean '--engine'?"],
    ),
    "abbreviated-option": (["build", "b300", "--dry"], UsageError, ["--dry"]),
    "mistyped-command": (["biuld", "b300"], UsageError, ["biuld", "build"]),
    "no-command": ([], UsageError, ["command"]),
    "unknown-engine": (
        ["build", "b300", "--engine", "buildha", "--dry-run"],
        UsageError,
        ["buildha", "did you mean 'buildah'?"],
    ),
    "base-without-digest": (
        ["build", "b300", "--base", "debian:13", "--engine=buildah", "--dry-run"],
        BaseImageError,
        ["debian:13", "sha256"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_main_returns_the_code_of_the_class(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, kind, words = CASES[name]
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    code = main(arguments)
    said = capsys.readouterr()
    assert code == kind.exit_code
    # Long messages wrap; what is asked for is in there, whatever the line breaks.
    flat = " ".join(said.err.split())
    for word in [kind.__name__, f"exit {kind.exit_code}", *words]:
        assert word in flat
    assert said.out.count("Traceback") == 0


def test_help_is_not_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "build" in capsys.readouterr().out


def test_argument_that_ends_in_a_colon_is_a_usage_error() -> None:
    assert main(["build", "b300", "x: "]) == UsageError.exit_code


def test_outside_a_checkout_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["build", "b300"]) == MatrixFileError.exit_code
    assert "VLLM_FORGE_ROOT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "there"), "Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_what_the_system_refuses_is_not_a_traceback(
    error: OSError,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*_: object) -> str:
        raise error

    (tmp_path / "matrix.toml").touch()
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(tmp_path))
    monkeypatch.setattr("vllm_forge.pages.registry.write_pages", refused)
    assert main(["docs"]) == FileAccessError.exit_code
    assert said in capsys.readouterr().err


def test_error_without_a_file_is_a_bug(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*_: object) -> str:
        raise OSError(9, "Bad file descriptor")

    (tmp_path / "matrix.toml").touch()
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(tmp_path))
    monkeypatch.setattr("vllm_forge.pages.registry.write_pages", refused)
    with pytest.raises(OSError, match="Bad file descriptor"):
        main(["docs"])


def test_interrupt_is_130_and_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    monkeypatch.setattr("vllm_forge.project.load", interrupted)
    assert main(["build", "b300"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_brackets_in_a_message_are_not_markup(
    monkeypatch: pytest.MonkeyPatch, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(_: Path) -> None:
        raise MatrixValueError("no [sku.x] and [/red] too")

    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    monkeypatch.setattr("vllm_forge.project.load", refused)
    assert main(["build", "b300"]) == MatrixValueError.exit_code
    assert "no [sku.x] and [/red] too" in capsys.readouterr().err


def test_credentials_of_an_index_are_not_shown() -> None:
    error = ForgeError("no answer", where="https://user:secret@index.example/simple")
    assert "secret" not in str(error)
    assert "https://index.example/simple" in str(error)
