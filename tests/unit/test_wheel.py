"""The wheel, built as a user does, installed and run in an empty folder, as pipx and uvx run it.

The environment is a new one with nothing but the wheel; a .pth file adds the folder with the
packages of the environment that runs the tests, so that no index is asked.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from uv import find_uv_bin

from tests.support.fast_build import fast_build, use
from tests.support.layouts import layout
from tests.support.project import REPO, make_project
from tests.support.project import Project as MiniProject
from tests.support.registry_server import RegistryServer
from tests.support.release import ReleaseRunner, Releases, git, releasable
from vllm_forge import __version__, cli
from vllm_forge.host import Runner, remove
from vllm_forge.host.files import file_digest
from vllm_forge.release.mirror import mirror
from vllm_forge.release.pipeline import release
from vllm_forge.release.registry import Reference

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Env = Mapping[str, str]

pytestmark = pytest.mark.xdist_group("wheel")  # one worker builds what its fixtures have

NAME = f"vllm_forge-{__version__}-py3-none-any.whl"
DATA = "vllm_forge/data/"
HOST = str(REPO / "tests/fixtures/doctor")
PROGRAM = ["pyproject.toml", "README.md", "LICENSE", "NOTICE", "src", "scripts"]
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
# Commands that need a checkout, each with what argparse wants of it.
REFUSED = {
    "build": ["b300"],
    "why-rebuild": ["b300"],
    "provision": [],
    "clean": [],
    "lint": [],
    "patch check": [],
    "patch lock": [],
    "patch checkout": ["work"],
    "patch export": ["work"],
    "patch prove": [],
    "patch upstream": [],
    "patch drift": [],
    "kernels select": ["--record"],
    "kernels coverage": ["--record"],
    "checkpoint quantize": ["--model=m", "--output=o"],
    "checkpoint fixtures": [],
    "checkpoint tools": [],
    "gpu test": ["b300"],
    "gpu rehearse": ["b300"],
    "gpu kit": ["b300", "--output=o"],
    "gpu prewarm": ["b300", "caches"],
    "gpu receipts": [],
    "dispatch status": [],
    "dispatch collect": [],
    "release": ["b300", "--stage=dev"],
    "receipts sign": ["r", "--key=k"],
    "receipts accept": ["r"],
    "wheels lock": [],
    "wheels fetch": [],
    "wheels record": [],
    "wheels patched": [],
    "dispatch build": ["--plan"],
    "docs": [],
    "bench build": [],
    "bench import": [
        "b300",
        "--preset=p",
        "--arm=a",
        "--session=s",
        "--workload=w",
        "--checkpoint=c",
        "--output=o",
        "--answers=a",
    ],
    "bench quality": [
        "b300",
        "--preset=p",
        "--arm=a",
        "--session=s",
        "--url=u",
        "--workload=w",
        "--checkpoint=c",
        "--output=o",
    ],
    "bench keep": ["output"],
    "bench run": ["b300", "session.toml", "--caches=c", "--output=o"],
    "bench serve": [
        "b300",
        "--preset=p",
        "--arm=a",
        "--session=s",
        "--url=u",
        "--workload=w",
        "--checkpoint=c",
        "--caches=c",
        "--output=o",
        "--order=0",
    ],
    "ci buildkite": [],
    "report": [],
    "verify": ["./image", "--rebuild"],
}


def build(source: Path, output: Path, *options: str) -> Path:
    """``uv build``, by the hatchling of this environment; returns the wheel."""
    argv = [find_uv_bin(), "build", "--offline", "--no-build-isolation", *options]
    argv += [f"--python={sys.executable}", f"--out-dir={output}", str(source)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output / NAME


@dataclass
class Installed:
    """A wheel in an environment of its own, and an empty folder."""

    environment: Path
    empty: Path

    @property
    def data(self) -> Path:
        (site,) = self.environment.glob("lib/python3.*/site-packages")
        return site / DATA

    def run(self, *argv: str, code: int = 0, env: Env = OFFLINE) -> tuple[str, str]:
        return run([str(self.environment / "bin" / "vllm-forge"), *argv], self.empty, code, env)


def run(argv: list[str], cwd: Path, code: int, env: Env) -> tuple[str, str]:
    """Stdout and stderr of a command that knows of no checkout but by ``env``."""
    kept = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VLLM_FORGE_ROOT"}}
    done = subprocess.run(
        argv, cwd=cwd, env={**kept, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def install(wheel: Path, folder: Path) -> Installed:
    made = Installed(folder / "environment", folder / "empty")
    made.empty.mkdir(parents=True)
    python = f"--python={made.environment / 'bin' / 'python'}"
    for argv in (
        ["venv", f"--python={sys.executable}", str(made.environment)],
        ["pip", "install", "--offline", "--no-deps", python, str(wheel)],
    ):
        subprocess.run([find_uv_bin(), argv[0], "--quiet", *argv[1:]], check=True)
    (made.data.parents[1] / "packages.pth").write_text(sysconfig.get_path("purelib"))
    return made


def from_checkout(root: Path, *argv: str, code: int = 0, env: Env = OFFLINE) -> tuple[str, str]:
    """The same in this process, whose code is the checkout's: no second for imports."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name, value in {**env, "VLLM_FORGE_ROOT": str(root)}.items():
            patch.setenv(name, value)
        patch.chdir(root)
        found = cli.main(argv)
    assert found == code, f"{argv}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def files_of(folder: Path) -> dict[str, str]:
    """Path -> SHA-256; without the interpreter, which is a link."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path): file_digest(path) for path in paths if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist of this checkout, and the wheel that was built from it."""
    return build(REPO, tmp_path_factory.mktemp("built")).parent


@pytest.fixture(scope="module")
def clean(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout, without what was built in it: unpacked from the sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built / f"vllm_forge-{__version__}.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    return folder / f"vllm_forge-{__version__}"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(built / NAME, tmp_path_factory.mktemp("installed"))


def test_wheel_has_the_same_bytes_each_time(built: Path, tmp_path: Path) -> None:
    """From the sdist, in another folder, or from the checkout."""
    assert file_digest(build(REPO, tmp_path, "--wheel")) == file_digest(built / NAME)


def test_wheel_has_the_data_and_no_other_files_of_the_checkout(built: Path) -> None:
    wanted = ("docker", "matrix.toml", "patches", "records")
    listing = git(REPO, "ls-files", "-z", "--cached", "--others", "--exclude-standard", *wanted)
    expected = {DATA + name for name in listing.split("\0") if name} | {f"{DATA}COMMIT"}
    with zipfile.ZipFile(built / NAME) as wheel:
        names = wheel.namelist()
        assert {name for name in names if name.startswith(DATA)} == expected
        tops = {name.partition("/")[0] for name in names}
        assert tops == {"vllm_forge", f"vllm_forge-{__version__}.dist-info"}
        assert not [name for name in names if "tests" in name.split("/")]
        contents = b"\0".join(map(wheel.read, names))
    assert not re.search(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/]{16}", contents)
    for path in (REPO, Path(sys.prefix), built):
        assert str(path).encode() not in contents


def test_editable_install_has_no_copy_of_the_data(tmp_path: Path) -> None:
    code = f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, capture_output=True)
    with zipfile.ZipFile(tmp_path / NAME) as wheel:
        assert not [name for name in wheel.namelist() if "COMMIT" in name or DATA in name]


def test_wheel_says_which_commit_it_is_of(installed: Installed, built: Path) -> None:
    head = git(REPO, "rev-parse", "HEAD").strip()
    state = f"{head} with changes" if git(REPO, "status", "--porcelain").strip() else head
    with zipfile.ZipFile(built / NAME) as wheel:
        metadata = f"vllm_forge-{__version__}.dist-info/extra_metadata/COMMIT"
        assert wheel.read(metadata).decode() == f"{state}\n"
    assert installed.run("--version")[0] == f"vllm-forge {__version__}, commit {state}\n"
    argv = [sys.executable, "-m", "vllm_forge", "--version"]
    source = {"PYTHONPATH": str(REPO / "src"), "VLLM_FORGE_ROOT": str(REPO)}
    assert run(argv, REPO, 0, {**OFFLINE, **source}) == installed.run("--version")


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["plan", "b300"], 0),
        (["plan", "b300", "--json"], 0),
        (["plan", "rtxpro6000", "--line", "0.33", "--json"], 0),
        (["plan", "h200", "--line", "0.26"], 0),
        (["serve", "b300", "--preset", "mtp", "--print"], 0),
        (["serve", "rtxpro6000", "--preset", "tp2-plain", "--print", "--engine=podman"], 0),
        (["serve", "b300", "--preset", "none", "--print"], 80),
        (["doctor", "b300", "--replay", f"{HOST}/b300"], 0),
        (["doctor", "b200", "--replay", f"{HOST}/no-gpu", "--json"], 81),
        (["verify", "./nowhere", "--offline"], 60),
        (["bench", "plan", "--card", "--json"], 0),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_answers_are_those_of_the_checkout(
    installed: Installed, clean: Path, argv: list[str], code: int
) -> None:
    before = files_of(installed.environment)
    expected = from_checkout(clean, *argv, code=code)
    assert installed.run(*argv, code=code) == expected
    assert files_of(installed.environment) == before
    assert list(installed.empty.iterdir()) == []


def test_checkpoint_is_judged_as_in_the_checkout(
    installed: Installed, clean: Path, tmp_path: Path
) -> None:
    argv = ["checkpoint", "inspect", str(layout(tmp_path, "card")), "--resolve=rules"]
    assert installed.run(*argv) == from_checkout(clean, *argv)


def test_checkout_goes_before_the_data_of_the_wheel(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "matrix.toml").write_text("broken")
    program = str(installed.environment / "bin" / "vllm-forge")
    pairs: tuple[tuple[Path, Env], ...] = (
        (tmp_path, {}),
        (installed.empty, {"VLLM_FORGE_ROOT": str(tmp_path)}),
    )
    for folder, env in pairs:
        stderr = run([program, "plan", "b300"], folder, 10, env)[1]
        assert f"where:  {tmp_path / 'matrix.toml'}" in stderr
    elsewhere = {"VLLM_FORGE_ROOT": str(installed.empty)}
    assert (
        "no matrix.toml here or above" in installed.run("plan", "b300", code=10, env=elsewhere)[1]
    )


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data of a wheel for the program in this process, which runs in an empty folder."""
    data = tmp_path / "data"
    for name in ("docker", "patches"):
        shutil.copytree(REPO / name, data / name)
    shutil.copy(REPO / "matrix.toml", data)
    for module in ("matrix.cells", "project"):
        monkeypatch.setattr(f"vllm_forge.{module}.PACKAGED", data)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    return data


@pytest.mark.parametrize("command", REFUSED)
def test_command_that_needs_a_checkout_says_so(
    packaged: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    before = files_of(packaged.parent)
    assert cli.main([*command.split(), *REFUSED[command]]) == 10
    name = "verify --rebuild" if command == "verify" else f"vllm-forge {command}"
    assert capsys.readouterr().err.splitlines() == [
        "CheckoutMissingError (exit 10)",
        f"{name} needs a checkout of vllm-forge, and there is none here",
        f"  where:  {packaged.parent / 'empty'}",
        "  remedy: run it inside a checkout, or set VLLM_FORGE_ROOT to one",
    ]
    assert files_of(packaged.parent) == before


def test_every_other_command_runs_from_the_wheel() -> None:
    """None is forgotten in the list above."""
    commands = {}
    queue = [("", cli._parser())]
    while queue:
        name, parser = queue.pop()
        below = [
            (f"{name} {key}".strip(), each)
            for action in parser._actions
            if isinstance(action.choices, dict)
            for key, each in action.choices.items()
        ]
        queue += below
        if not below:
            commands[name] = parser.get_default("packaged")
    assert {name for name, runs in commands.items() if not runs} == REFUSED.keys() - {"verify"}
    assert {name for name, runs in commands.items() if runs} == {
        "serve", "plan", "doctor", "install", "checkpoint inspect", "verify", "notes", "sbom",
        "mirror", "bench claims", "bench crosscheck", "bench export", "bench gate", "bench plan",
        "bench report", "bench score", "bench sign", "bench workload",
    }  # fmt: skip


@dataclass
class Shop:
    """The small project, its wheel, and an image of it in a folder, as a stranger gets both."""

    mini: MiniProject
    installed: Installed
    image: Path
    reference: Reference


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    with ExitStack() as stack:
        mini = make_project(folder / "mini")
        stack.callback(mini.index.close)
        copy_program(mini.root)
        use(mini, stack.enter_context(pytest.MonkeyPatch.context()))
        keys = stack.enter_context(releasable(mini, folder))
        fast_build(mini, "alpha", base="locked")
        registry = stack.enter_context(RegistryServer().running())
        reference = Reference.parse(f"{registry.host}/forge/vllm")
        outcome = release(Releases(mini, keys, reference).job("candidate"), ReleaseRunner())
        assert outcome is not None
        published, image = reference.at(outcome.digest), folder / "image"
        mirror(published, image, Runner())
        installed = install(build(mini.root, folder / "wheel"), folder / "place")
        yield Shop(mini, installed, image, published)


def copy_program(root: Path) -> None:
    for name in PROGRAM:
        if (REPO / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPO / name, root / name, ignore=ignore)
        else:
            shutil.copy(REPO / name, root)


def test_released_image_is_verified_by_the_keys_of_the_wheel(shop: Shop, tmp_path: Path) -> None:
    argv = ["verify", str(shop.image), "--offline", "--deep", "--stage=candidate"]
    stdout, _ = shop.installed.run(*argv)
    assert "holds for stage candidate" in stdout
    assert (stdout, "") == from_checkout(shop.mini.root, *argv)
    shutil.rmtree(shop.mini.root / "dist")
    argv = ["sbom", str(shop.image)]
    assert shop.installed.run(*argv) == from_checkout(shop.mini.root, *argv)
    shutil.copytree(shop.image, tmp_path / "image")  # without what was attached
    argv = ["verify", str(tmp_path / "image"), "--offline", "--stage=candidate"]
    assert "StatementMissingError" in shop.installed.run(*argv, code=111)[1]


def test_image_is_copied_from_a_registry_by_the_wheel(shop: Shop, tmp_path: Path) -> None:
    target = tmp_path / "image"
    assert shop.installed.run("mirror", str(shop.reference), str(target), env={})[0]
    argv = ["notes", str(target), "--stage=candidate"]
    assert shop.installed.run(*argv) == from_checkout(shop.mini.root, *argv)
    assert (tmp_path / "image.attest").is_dir()


def test_vllm_of_an_environment_is_patched_from_the_wheel(shop: Shop, tmp_path: Path) -> None:
    env = {k: v for k, v in shop.mini.environment.items() if k.startswith(("UV_", "no_", "VLLM_"))}
    del env["VLLM_FORGE_ROOT"]
    env["VLLM_FORGE_CACHE"] = str(tmp_path / "cache")
    texts = []
    for place in ("wheel", "checkout"):
        python = tmp_path / place / "bin" / "python"
        argv = ["venv", "--quiet", f"--python={sys.executable}", str(tmp_path / place)]
        subprocess.run([find_uv_bin(), *argv], check=True)
        argv = ["install", f"--python={python}"]
        if place == "wheel":
            stdout = shop.installed.run(*argv, env=env)[0]
        else:
            stdout = from_checkout(shop.mini.root, *argv, env=env)[0]
        assert re.match(r"vLLM 0\.1\.0\+forge\.[0-9a-f]+: ", stdout)
        texts.append(stdout.replace(str(tmp_path / place), "ENVIRONMENT"))
    assert texts[0] == texts[1]
    wheel = f"--python={tmp_path / 'wheel' / 'bin' / 'python'}"
    assert "as published" in shop.installed.run("install", wheel, "--revert", env=env)[0]


@pytest.mark.parametrize("kind", ["key", "link", "ignored"])
def test_wheel_with_a_file_that_is_not_data_is_not_built(shop: Shop, kind: str) -> None:
    """A file that git ignores would be in a wheel whose COMMIT says that nothing was changed."""
    path, why = shop.mini.root / "records" / "keys" / "lab-key.pem", "is a link or a private key"
    if kind == "key":
        path.write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n")
    elif kind == "link":
        path.symlink_to("/etc/hostname")
    else:
        path, why = shop.mini.root / "records" / "dist", "records/dist/ is not of the commit"
        (path / "x").mkdir(parents=True)
        (path / "x" / "more.json").touch()
    try:
        with pytest.raises(AssertionError, match=why):
            build(shop.mini.root, shop.image.parent / "refused", "--wheel")
    finally:
        remove(path)


def test_wheel_of_changed_files_says_so(shop: Shop, tmp_path: Path) -> None:
    path = shop.mini.root / "records" / "new.json"
    path.write_text("{}")
    build(shop.mini.root, tmp_path)
    path.unlink()
    with zipfile.ZipFile(tmp_path / NAME) as wheel:
        text = wheel.read(f"{DATA}COMMIT").decode()
    head = git(shop.mini.root, "rev-parse", "HEAD").strip()
    assert text == f"{head} with changes\n"
