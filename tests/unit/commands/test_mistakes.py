"""Typical mistakes on the command line: the right words, the right class, never a traceback."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from vllm_forge.bench.errors import WorkloadFileError
from vllm_forge.cli import main
from vllm_forge.commands.parsers import Parser
from vllm_forge.dispatch.errors import SiteFileError
from vllm_forge.errors import ForgeError, UsageError
from vllm_forge.host.errors import FileAccessError, ToolMissingError
from vllm_forge.images.errors import BaseImageError, LayoutError
from vllm_forge.matrix.errors import UnknownLineError, UnknownSkuError
from vllm_forge.serve.errors import UnknownArtifactError, UnknownPresetError

if TYPE_CHECKING:
    from pathlib import Path

TEST = ["gpu", "test", "h200"]
SERVE = ["serve", "--sku=b300", "--preset=mtp"]
# Arguments, class, words of the message. "!word" must not be in it.
MISTAKES: dict[str, tuple[list[str], type[ForgeError], list[str]]] = {
    "no command": ([], UsageError, ["command", "required"]),
    "mistyped command": (["paln"], UsageError, ["'paln'", "did you mean 'plan'?"]),
    "unknown command": (["frobnicate"], UsageError, ["'frobnicate'", "expected one of", "build"]),
    "group without command": (["patch"], UsageError, ["missing COMMAND"]),
    "mistyped command of a group": (["patch", "chekc"], UsageError, ["did you mean 'check'?"]),
    "old name": (["census"], UsageError, ["'census'", "kernels"]),
    "no SKU": (["plan"], UsageError, ["missing SKU", "--sku"]),
    "two SKUs": (["build", "b300", "--sku=b200"], UsageError, ["b300", "b200"]),
    "unknown SKU": (["plan", "--sku=b30"], UnknownSkuError, ["'b30'", "'b300'"]),
    "arch in another form": (["plan", "rtx-pro-6000"], UnknownSkuError, ["rtxpro6000"]),
    "unknown line": (["plan", "b300", "--line=0.27"], UnknownLineError, ["0.27", "0.26"]),
    "release for a line": (["plan", "b300", "--line=v0.26"], UnknownLineError, ["'0.26'"]),
    "mistyped option": (["build", "b300", "--lien=1"], UsageError, ["--lien", "'--line'"]),
    "mistyped option with value": (
        ["build", "b300", "--enginee=docker"],
        UsageError,
        ["'--engine'"],
    ),
    "abbreviated option": (["build", "b300", "--dry"], UsageError, ["unknown option --dry"]),
    "option of another command": (
        ["plan", "b300", "--dry-run"],
        UsageError,
        ["unknown option --dry-run", "!did you mean"],
    ),
    "option without its value": (
        ["plan", "b300", "--line"],
        UsageError,
        ["--line", "expected one"],
    ),
    "one argument too many": (["plan", "b300", "b200"], UsageError, ["'b200'"]),
    "argument that ends in a colon": (["build", "b300", "x: "], UsageError, ["'x: '"]),
    "option of vLLM": (
        [*SERVE, "--max-model-len=8192"],
        UsageError,
        ["--max-model-len", "after --", "!did you mean"],
    ),
    "port of vLLM after --": ([*SERVE, "--", "--port", "8080"], UsageError, ["before --"]),
    "option of vLLM in plan": (
        ["plan", "b300", "--", "--enforce-eager"],
        UsageError,
        ["--enforce"],
    ),
    "no preset": (["serve", "b300"], UsageError, ["missing --preset", "presets of b300: mtp"]),
    "mistyped preset": (
        ["serve", "b300", "--preset=mpt", "--print"],
        UnknownPresetError,
        ["mpt", "'mtp'"],
    ),
    "artifact of another name": (
        [*SERVE, "--print", "--artifact=flash-w4a16-fp8-mtq"],
        UnknownArtifactError,
        ["did you mean 'flash-w4a16-fp8-mtp'?", "b300-mtp serves"],
    ),
    "artifact that the preset does not serve": (
        [*SERVE, "--print", "--artifact=flash-w4a16-fp8"],
        UnknownArtifactError,
        ["b300-mtp does not serve artifact flash-w4a16-fp8", "!did you mean"],
    ),
    "too few GPUs": (
        [*SERVE, "--print", "--gpu-ids=4,5"],
        UsageError,
        ["2 GPUs are given", "list 4 GPUs in --gpu-ids"],
    ),
    "prompts that are not there": (
        [
            "bench",
            "serve",
            "b300",
            "--preset=mtp",
            "--arm=a",
            "--session=s",
            "--order=0",
            "--url=http://127.0.0.1:9",
            "--workload=/nonexistent",
            "--checkpoint=x",
            "--caches=x",
            "--output=x",
        ],
        WorkloadFileError,
        ["file not found", "/nonexistent", "!Error("],
    ),
    "workload that is mistyped": (
        ["bench", "workload", "--workload=randm", "--output=x"],
        UsageError,
        ["did you mean 'random'?"],
    ),
    "option before an action that would ignore it": (
        ["dispatch", "--key=key.pem", "collect"],
        UsageError,
        ["--key before collect: write it after"],
    ),
    "cluster without SKUs": (["dispatch", "--to=slurm"], UsageError, ["missing --skus"]),
    "site file that is not there": (
        ["dispatch", "--to=slurm", "--skus=b300", "--site=/nonexistent.toml"],
        SiteFileError,
        ["missing site file", "/nonexistent.toml", "docs/operate/cluster.md"],
    ),
    "folder without an image": (
        ["verify", "./nonexistent", "--offline"],
        LayoutError,
        ["image not found", "nonexistent", "HOST/NAME:TAG"],
    ),
    "archive instead of a folder": (
        ["verify", __file__, "--offline"],
        LayoutError,
        ["not a folder", "tar -xf test_mistakes.py", "!build again"],
    ),
    "unknown engine to serve": ([*SERVE, "--engine=lxc"], UsageError, ["'lxc'", "docker, podman"]),
    "unknown engine to build": (
        ["build", "b300", "--engine=podman", "--dry-run"],
        UsageError,
        ["podman", "docker", "buildah"],
    ),
    "mistyped engine": (
        ["build", "b300", "--engine=buildha", "--dry-run"],
        UsageError,
        ["'buildah'"],
    ),
    "base without digest": (
        ["build", "b300", "--base=debian:trixie", "--engine=buildah", "--dry-run"],
        BaseImageError,
        ["debian:trixie", "sha256"],
    ),
    "minutes that are not a number": (
        [*TEST, "--minutes=soon"],
        UsageError,
        ["--minutes", "'soon'"],
    ),
    "no minutes": ([*TEST, "--minutes=0"], UsageError, ["--minutes", "'0'", "greater than 0"]),
    "infinite minutes": ([*TEST, "--minutes=inf"], UsageError, ["--minutes", "'inf'"]),
    "not a size": (
        ["gpu", "kit", "h200", "--output=x", "--max-part=62MB"],
        UsageError,
        ["'62MB'", "a number"],
    ),
    "not a number of processes": (
        [*TEST, "-n0"],
        UsageError,
        ["-n", "'0'", "auto"],
    ),
    "unknown tier": (["gpu", "test", "h200", "--tier=kernle"], UsageError, ["'kernel'"]),
    "checkpoint without folder": (
        ["gpu", "test", "h200", "--checkpoint=tiny=/nonexistent"],
        UsageError,
        ["tiny=/nonexistent", "NAME=DIR"],
    ),
    "checkpoint of one name twice": (
        ["gpu", "kit", "h200", "--output=x", "--checkpoint=tiny=/usr", "--checkpoint=tiny=/etc"],
        UsageError,
        ["duplicate --checkpoint tiny", "/etc"],
    ),
    "workloads that are not there": (
        ["gpu", "test", "h200", "--workloads=/nonexistent"],
        UsageError,
        ["/nonexistent"],
    ),
    "values without a source": (
        ["checkpoint", "inspect", "x", "--values=3"],
        UsageError,
        ["--values", "--source"],
    ),
    "recording that is not there": (
        ["doctor", "b300", "--replay=/nonexistent"],
        UsageError,
        ["/nonexistent"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_explained(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, kind, words = MISTAKES[name]
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    assert main(argv) == kind.exit_code
    output = capsys.readouterr()
    message = " ".join(output.err.split())
    assert f"{kind.__name__} (exit {kind.exit_code})" in message
    assert "remedy:" in message
    for word in words:
        assert (word.removeprefix("!") in message) is not word.startswith("!"), (word, message)
    assert not output.out


@pytest.mark.parametrize("name", ["unknown SKU", "no SKU", "mistyped option", "mistyped preset"])
def test_mistake_is_json(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, kind, _ = MISTAKES[name]
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    if argv[0] == "serve":
        argv = ["doctor", "b300", "--preset=mpt"]
    assert main([*argv, "--json"]) == kind.exit_code
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["class"] == kind.__name__
    assert error["exit_code"] == kind.exit_code
    assert set(error) == {"class", "exit_code", "what", "where", "remedy"}
    assert error["what"]


def test_red_verdict_leaves_one_json_document(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    recording = root / "tests" / "fixtures" / "doctor" / "no-gpu"
    assert main(["doctor", "b300", f"--replay={recording}", "--json"]) == 81
    assert {row["level"] for row in json.loads(capsys.readouterr().out)} >= {"red"}


def test_sku_is_positional_or_an_option(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    plans = []
    for argv in (["b300"], ["--sku", "b300"], ["--sku=sm_103a"], ["b300", "--sku=b300"]):
        assert main(["plan", "--json", *argv]) == 0
        plans.append(capsys.readouterr().out)
    assert len(set(plans)) == 1


def commands() -> dict[str, Parser]:
    """Name -> parser of every command, groups left out."""
    parsers: dict[str, Parser] = {}

    def visit(parser: Parser) -> None:
        groups = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
        for children in groups:
            for child in children.values():
                visit(child)
        if not groups:
            parsers[parser.prog] = parser

    from vllm_forge.cli import _parser

    visit(_parser())
    return parsers


def test_shared_options_mean_the_same_everywhere() -> None:
    texts: dict[str, set[str]] = {"--sku": set(), "--line": set(), "--json": set()}
    for parser in commands().values():
        for option, helps in texts.items():
            if action := parser._option_string_actions.get(option):
                helps.add(action.help or "")
    assert {option: len(helps) for option, helps in texts.items()} == {
        "--sku": 1,
        "--line": 2,  # the default is one line or all, and the help says which
        "--json": 1,
    }


def test_every_option_has_help() -> None:
    assert len(commands()) > 20
    for name, parser in commands().items():
        assert parser.description, name
        for action in parser._actions:
            assert action.help, f"{name} {action.option_strings or action.dest}"


@pytest.mark.parametrize("arguments", [["--help"], ["patch", "--help"], ["plan", "--help"]])
def test_help_is_not_a_failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    assert "usage: vllm-forge" in capsys.readouterr().out


def test_help_imports_no_library_of_single_commands() -> None:
    """Each command pays for its own: all of them together take seconds to import."""
    own = {
        "bs4", "cryptography", "cyclonedx", "docker", "huggingface_hub", "installer", "numpy",
        "packageurl", "pypi_simple", "securesystemslib", "sigstore", "zstandard",
    }  # fmt: skip
    script = "import sys; from vllm_forge import cli; cli._parser(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not own & set(done.stdout.split())


def test_signatures_with_keys_need_no_library_of_keyless_ones() -> None:
    """And reading an SBOM none of writing one: sigstore and cyclonedx take a second to import."""
    rooms = "vllm_forge.receipts.handover, vllm_forge.release.statements"
    script = f"import sys, {rooms}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not {"sigstore", "cyclonedx"} & set(done.stdout.split())


def shell(script: str, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            "bash",
            "-o",
            "pipefail",
            "-c",
            script.replace("FORGE", f"{sys.executable} -m vllm_forge"),
        ],
        env={**os.environ, "VLLM_FORGE_ROOT": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_closed_pipe_is_reported(root: Path) -> None:
    done = shell("FORGE plan b300 --json | true", root)
    assert done.returncode == 141
    assert "stdout was closed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("name", "code"), [("TERM", 143), ("HUP", 129), ("INT", 130)])
def test_signal_is_reported(name: str, code: int, root: Path, tmp_path: Path) -> None:
    (tmp_path / "matrix.toml").touch()
    script = (
        "import signal, sys, vllm_forge.project, vllm_forge.cli as cli; "
        "vllm_forge.project.load = lambda _: (print('waiting', flush=True), signal.pause()); "
        "sys.exit(cli.main(['plan', 'b300']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "VLLM_FORGE_ROOT": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert f"SIG{name}" in errors
    assert "Traceback" not in errors


def test_failed_copy_to_a_full_disk_is_not_a_traceback(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    def full(_: Path) -> None:
        raise shutil.Error([("from", "/output/blob", "[Errno 28] No space left on device")])

    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    monkeypatch.setattr("vllm_forge.project.load", full)
    assert main(["plan", "b300"]) == 33
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "/output/blob" in message


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_failed_read_or_write_is_not_a_traceback(
    number: int, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an open file: the error names none."""

    def fail(_: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    monkeypatch.setattr("vllm_forge.project.load", fail)
    assert main(["plan", "b300"]) == FileAccessError.exit_code
    assert os.strerror(number) in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["build", "b300"], ["release", "b300", "--stage=dev"]])
def test_dry_run_prints_no_json(
    argv: list[str], root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    assert main([*argv, "--dry-run", "--json"]) == UsageError.exit_code
    assert "exclude each other" in json.loads(capsys.readouterr().out)["error"]["what"]


@pytest.mark.parametrize("program", ["git", "setpriv"])
def test_missing_program_is_named_as_one(
    program: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def call(_: Path) -> None:
        subprocess.run([program], check=False)

    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("vllm_forge.project.load", call)
    assert main(["plan", "b300"]) == ToolMissingError.exit_code
    message = capsys.readouterr().err
    assert f"{program} is not installed" in message
    assert "path that can be read" not in message


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="Path.resolve() refuses a loop before Python 3.13 only"
)
def test_loop_of_links_is_not_a_traceback(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    argv = [*SERVE, "--print", f"--api-key-file={tmp_path / 'loop'}"]
    assert main(argv) == FileAccessError.exit_code
    assert "Symlink loop" in capsys.readouterr().err
