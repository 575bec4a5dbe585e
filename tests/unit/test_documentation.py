"""Commands in the documentation parse and, where they can, run; links resolve; pages are short."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nox
import pytest

from vllm_forge import cli
from vllm_forge.commands.parsers import parse
from vllm_forge.matrix import load

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")
    if name and not name.startswith("patches/")
)  # fmt: skip
GENERATED = ROOT / "docs" / "generated"
WORDS = 1500
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:nox|python3 -m nox) -[^`]+)`")
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
# Programs of others, whose options are not checked.
OTHERS = {
    "buildkite-agent", "cosign", "curl", "docker", "git", "grep", "hf", "kubectl", "mkdir",
    "openssl", "oras", "pip", "pre-commit", "sh", "sinfo", "skopeo", "tar", "uv",
}  # fmt: skip
SCRIPTS = {"scripts/install_vllm_with_patches.sh": ["install"]}
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


def documented() -> Iterator[tuple[str, list[str]]]:
    """Page and words of each command."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        commands = [line for block in SHELL.findall(text) for line in simple_commands(block)]
        inline = [shlex.split(line) for line in INLINE.findall(text)]
        for words in [*commands, *inline]:
            if not {"NAME", "COMMAND"} & set(words[:5]):  # `nox -s NAME -- OPTIONS` is a form
                yield path.relative_to(ROOT).as_posix(), words


def simple_commands(block: str) -> Iterator[list[str]]:
    """The simple commands of shell text, without assignments and redirections."""
    block = re.sub(r"(^|\s)#.*$", "", block, flags=re.M).replace("\\\n", " ")
    lexer = shlex.shlex(block, posix=True, punctuation_chars="|&;<>\n")
    lexer.whitespace, lexer.commenters = " \t", ""
    lexer.whitespace_split = True
    words: list[str] = []
    redirected = False
    for token in [*lexer, "\n"]:
        if set(token) <= set("|&;\n"):
            if words:
                yield words
            words = []
        elif set(token) <= set("<>"):
            redirected = True
        elif redirected:
            redirected = False
        elif words or not ASSIGNMENT.fullmatch(token):
            words.append(token)


@cache
def noxfile() -> Any:
    """The noxfile as a module, with its sessions in nox's registry."""
    spec = importlib.util.spec_from_file_location("documented_noxfile", ROOT / "noxfile.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeSession:
    """What a session function uses."""

    def __init__(self, posargs: list[str]) -> None:
        self.posargs = posargs


def session_commands(name: str, posargs: list[str], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The commands that a nox session would run."""
    module, ran = noxfile(), []
    monkeypatch.setattr(module, "tool", lambda session, name, extras="": name)
    monkeypatch.setattr(module, "run", lambda *argv: ran.append(list(argv)))
    monkeypatch.setattr(
        module.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "python")
    )
    sessions = nox.registry.get()
    assert name in sessions, f"no session {name}"
    sessions[name].func(FakeSession(posargs))
    return ran


def forge_commands(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of vllm-forge that a documented command leads to.

    Raises:
        AssertionError: it is not a command that exists.
    """
    program, *rest = words
    if program == "uvx":  # --from WHEEL vllm-forge ...
        return [words[words.index("vllm-forge") + 1 :]]
    written = program == "python3" and rest[0].endswith("/sparse.py")  # by fixtures full --recipe
    if written or program in OTHERS or words[:3] == ["python3", "-m", "pip"]:
        return []
    if program == "bash" or program.startswith((".nox/", "scripts/")):
        target = rest[0] if program == "bash" else program
        if target in SCRIPTS:
            return [SCRIPTS[target] + rest]
        path = next((word for word in rest if word.endswith(".py")), target)
        assert program.startswith(".nox/") or (ROOT / path).exists(), words
        return []
    if words[:3] == ["python3", "-m", "nox"]:
        rest = words[3:]
    else:
        assert program == "nox", f"unknown program {program}"
    if rest == ["-l"]:
        return []
    assert rest[0] == "-s", words
    options, _, posargs = " ".join(rest[1:]).partition(" -- ")
    ran = []
    for name in options.split():
        split = rest[rest.index("--") + 1 :] if posargs else []
        ran += session_commands(name, split, monkeypatch)
    return [argv[1:] for argv in ran if argv[0] == "vllm-forge"]


DOCUMENTED = list(documented())


@pytest.mark.parametrize(
    ("page", "words"), DOCUMENTED, ids=[f"{page}:{' '.join(w)}" for page, w in DOCUMENTED]
)
def test_documented_command_parses(
    page: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for argv in forge_commands(words, monkeypatch):
        if not {"--help", "--version"} & set(argv):
            parse(cli._parser(), argv)


def runnable(argv: list[str]) -> bool:
    """A command that needs no network, engine, GPU or root, and writes only where it runs."""
    return (
        argv[0] in {"plan", "lint", "why-rebuild", "ci"}
        or (
            argv[:2] in (["bench", "plan"], ["bench", "workload"], ["gpu", "receipts"])
            and "--result" not in argv
        )
        or (argv[:2] == ["dispatch", "build"] and "--plan" in argv)
        or (
            argv[0] == "serve"
            and "--model" not in argv  # a checkpoint's folder: tests/unit/serve
            and bool({"--print", "--compose", "--systemd", "--k8s"} & {*argv})
        )
        or (argv[0] == "build" and "--dry-run" in argv)
        or argv == ["docs", "--check"]
    )


def test_documented_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = {
        tuple(argv)
        for _, words in DOCUMENTED
        for argv in forge_commands(words, monkeypatch)
        if runnable(argv)
    }
    monkeypatch.undo()
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(ROOT))
    monkeypatch.chdir(tmp_path)
    assert {argv[0] for argv in commands} == {
        "bench", "build", "ci", "dispatch", "docs", "gpu", "lint", "plan", "serve", "why-rebuild"
    }  # fmt: skip
    for argv in sorted(commands):
        assert cli.main(list(argv)) == 0, (argv, capsys.readouterr().err)


def test_saved_doctor_report_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As docs/operate/doctor.md says; the verdict is that of the host, and of the replay."""
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(ROOT))
    saved = str(tmp_path / "doctor-report")
    code = cli.main(["doctor", "--sku", "b300", "--save", saved])
    first = capsys.readouterr().out
    assert cli.main(["doctor", "--sku", "b300", "--replay", saved]) == code
    assert capsys.readouterr().out == first


def test_both_commands_of_ci_are_in_the_readme() -> None:
    """Others copy them verbatim."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    install = "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install nox && python3 -m nox -s "
    for session in ("build-sm120", "test"):
        assert f"```sh\n{install}{session} -- --provision\n```" in text


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    broken = []
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists():
            broken.append(link)
        elif anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            if anchor not in map(slug, headings):
                broken.append(link)
    assert not broken


@pytest.mark.parametrize(
    "path",
    [path for path in PAGES if path.parent != GENERATED],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_page_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").split()) <= WORDS, "split it"


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link).resolve() for link in LINK.findall(index.read_text())}
    pages = {path for path in PAGES if path.is_relative_to(ROOT / "docs")} - {index}
    assert pages <= linked


def test_page_says_what_a_chat_does_on_each_line() -> None:
    """Case 20 of the field reports."""
    page = (ROOT / "docs/operate/serve.md").read_text(encoding="utf-8")
    shown = {
        line: (words, place)
        for lines, words, place in re.findall(r"^\| ([\d., ]+) \| (.*?) \| `(.*?)` \|$", page, re.M)
        for line in lines.split(", ")
    }
    assert shown == {
        name: (
            "thinks" if line.chat.thinking else "does not think",
            ":".join(line.chat.source.split(":")[:2]),
        )
        for name, line in load(ROOT).line.items()
        if line.chat is not None
    }


def test_issue_template_asks_for_a_saved_doctor_report() -> None:
    text = (ROOT / ".github/ISSUE_TEMPLATE/problem.yml").read_text(encoding="utf-8")
    (command,) = re.findall(r"`nox -s (doctor -- --sku SKU --save [\w-]+)`", text)
    parse(cli._parser(), command.replace(" -- ", " ").split())


def test_commands_are_read_from_shell_text() -> None:
    text = "A=1 x -a && y 'b c' # no\n\nz d | w > file\n"
    assert list(simple_commands(text)) == [["x", "-a"], ["y", "b c"], ["z", "d"], ["w"]]
