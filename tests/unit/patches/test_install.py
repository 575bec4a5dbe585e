"""The installer on a real virtual environment with the tiny vllm: all files or none, and back."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from uv import find_uv_bin

from tests.support.project import PATCHED, REPO, Project, make_project
from vllm_forge.commands.patch import _install_release
from vllm_forge.host import Runner
from vllm_forge.matrix import load
from vllm_forge.patches.errors import NoEnvironmentError
from vllm_forge.patches.wheel import probe

pytestmark = pytest.mark.xdist_group("install")  # one worker builds what its fixtures have

SCRIPT = "install_vllm_with_patches.sh"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    made = make_project(tmp_path_factory.mktemp("mini"))
    yield made
    made.index.close()


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A new environment's interpreter, without vllm."""
    subprocess.run(
        [find_uv_bin(), "venv", "--quiet", "--python", sys.executable, str(tmp_path / "env")],
        check=True,
    )
    return tmp_path / "env" / "bin" / "python"


@pytest.fixture
def installed(project: Project, python: Path) -> Path:
    """The same with the published vllm in it."""
    pip(project, python, "install", "vllm==0.1.0")
    return python


def pip(project: Project, python: Path, *args: str, link: str = "copy") -> str:
    argv = [find_uv_bin(), "pip", *args, f"--python={python}"]
    done = subprocess.run(
        argv,
        env=project.environment | {"UV_LINK_MODE": link},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def site(python: Path) -> Path:
    (folder,) = (python.parent.parent / "lib").glob("python3.*/site-packages")
    return folder


def snapshot(python: Path) -> dict[str, str]:
    return {
        str(path.relative_to(site(python))): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(site(python).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def version(python: Path) -> str:
    code = "import importlib.metadata as m, vllm; print(m.version('vllm'), vllm.__version__)"
    return subprocess.run(
        [python, "-B", "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_patch_and_revert_give_back_every_byte(project: Project, installed: Path) -> None:
    before = snapshot(installed)
    project.call("install", f"--python={installed}")
    ours = version(installed).split()
    assert ours[0] == ours[1]
    assert ours[0].startswith("0.1.0+forge.")
    assert "is not None" in (site(installed) / PATCHED).read_text()
    assert f"vllm=={ours[0]}" in pip(project, installed, "freeze")
    project.call("install", f"--python={installed}", "--revert")
    assert version(installed) == "0.1.0 0.1.0"
    assert snapshot(installed) == before


def test_patched_environment_can_be_uninstalled(project: Project, installed: Path) -> None:
    """RECORD and metadata agree after the change."""
    project.call("install", f"--python={installed}")
    pip(project, installed, "check")
    pip(project, installed, "uninstall", "vllm")
    assert not [path for path in snapshot(installed) if path.startswith("vllm")]


def test_it_equals_the_patched_wheel(project: Project, installed: Path, tmp_path: Path) -> None:
    out = project.call("wheels", "patched", "--output", str(tmp_path)).stdout.strip()
    project.call("install", f"--python={installed}")
    by_installer = {p: h for p, h in snapshot(installed).items() if p.startswith("vllm/")}
    pip(project, installed, "install", "--no-deps", "--reinstall", out)
    by_wheel = {p: h for p, h in snapshot(installed).items() if p.startswith("vllm/")}
    assert by_installer == by_wheel


def test_package_cache_is_left_as_it_is(project: Project, python: Path) -> None:
    """uv hard-links from its cache: writing through such a link would change every environment."""
    pip(project, python, "install", "vllm==0.1.0", link="hardlink")
    before = snapshot(python)
    project.call("install", f"--python={python}")
    ours = version(python).split()[0]
    pip(project, python, "uninstall", "vllm")
    pip(project, python, "install", "vllm==0.1.0", "--offline", link="hardlink")
    assert version(python) != f"{ours} {ours}"
    assert snapshot(python) == before


def test_installs_the_release_first(project: Project, python: Path) -> None:
    done = project.call("install", f"--python={python}")
    assert "the lock is for Python 3.13" in done.stderr or sys.version_info[:2] == (3, 13)
    assert version(python).startswith("0.1.0+forge.")


def test_twice_is_an_error(project: Project, installed: Path) -> None:
    project.call("install", f"--python={installed}")
    before = snapshot(installed)
    project.call("install", f"--python={installed}", code=40)
    assert snapshot(installed) == before


def test_two_at_once_are_one_after_the_other(project: Project, installed: Path) -> None:
    argv = [sys.executable, "-m", "vllm_forge", "install", f"--python={installed}"]
    both = [
        subprocess.Popen(argv, env=project.environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 40], said
    assert any("already" in text for text in said)
    assert version(installed).startswith("0.1.0+forge.")


def test_revert_of_the_published_one_is_an_error(project: Project, installed: Path) -> None:
    before = snapshot(installed)
    project.call("install", f"--python={installed}", "--revert", code=40)
    assert snapshot(installed) == before


@pytest.mark.parametrize("path", [PATCHED, "vllm/__init__.py"])
def test_dirty_tree_is_refused_and_untouched(project: Project, installed: Path, path: str) -> None:
    """Also a file that the series does not change."""
    with (site(installed) / path).open("a") as file:
        file.write("# edited by hand\n")
    before = snapshot(installed)
    done = project.call("install", f"--python={installed}", code=40)
    assert path in done.stderr
    assert snapshot(installed) == before


def test_partly_patched_is_refused_and_revert_makes_it_whole(
    project: Project, installed: Path
) -> None:
    """What a kill -9 between the renames leaves."""
    pristine = snapshot(installed)
    published = (site(installed) / PATCHED).read_bytes()
    project.call("install", f"--python={installed}")
    (site(installed) / PATCHED).write_bytes(published)
    before = snapshot(installed)
    done = project.call("install", f"--python={installed}", code=40)
    assert "--revert" in done.stderr
    assert snapshot(installed) == before
    project.call("install", f"--python={installed}", "--revert")
    assert snapshot(installed) == pristine


def test_another_release_is_refused(project: Project, installed: Path) -> None:
    info = site(installed) / "vllm-0.1.0.dist-info"
    text = (info / "METADATA").read_text()
    (info / "METADATA").write_text(text.replace("Version: 0.1.0", "Version: 0.0.9"))
    info.rename(info.with_name("vllm-0.0.9.dist-info"))
    done = project.call("install", f"--python={installed}", code=40)
    assert "0.0.9 is installed" in done.stderr


def test_files_that_cannot_be_written_change_nothing(project: Project, installed: Path) -> None:
    """The second of the new files cannot be made: the first one is taken back."""
    (site(installed) / "vllm" / ".vllm-forge-_version.py").mkdir()
    before = snapshot(installed)
    process = project.start("install", f"--python={installed}")
    process.communicate()
    assert process.returncode != 0
    assert snapshot(installed) == before


def test_no_environment(project: Project, tmp_path: Path) -> None:
    project.call("install", f"--python={tmp_path}/bin/python", code=40)
    real = os.path.realpath(sys.executable)
    done = project.call("install", f"--python={real}", code=40)
    assert "not a virtual environment" in done.stderr


def test_editable_install_is_refused(project: Project, python: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "vllm").mkdir(parents=True)
    (source / "vllm" / "__init__.py").touch()
    info = site(python) / "vllm-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.1.0\n")
    (info / "direct_url.json").write_text(
        f'{{"url": "file://{source}", "dir_info": {{"editable": true}}}}'
    )
    project.call("install", f"--python={python}", code=40)


PYTHON = """#!/bin/bash
# python3 -m venv DIR makes a stand-in: pip install --editable ROOT gives it a vllm-forge of ROOT.
case "$*" in
"-c ") exit 0 ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip install --quiet --editable "*)
    echo "$6" >> "$LOG"
    printf '#!/bin/bash\necho code of %s, root "$VLLM_FORGE_ROOT", "$*" "$PYTHONPATH"\n' "$6" \
        > "$(dirname "$0")/vllm-forge"
    chmod +x "$(dirname "$0")/vllm-forge" ;;
*) exit 9 ;;
esac
"""


class TestScript:
    """Its environment, with a python3 that only pretends to install."""

    @pytest.fixture
    def tools(self, tmp_path: Path) -> Path:
        folder = tmp_path / "tools"
        folder.mkdir()
        (folder / "python3").write_text(PYTHON)
        (folder / "python3").chmod(0o755)
        return folder

    @staticmethod
    def checkout(folder: Path) -> Path:
        (folder / "scripts").mkdir(parents=True)
        for name in ("matrix.toml", "pyproject.toml", f"scripts/{SCRIPT}"):
            shutil.copy(REPO / name, folder / name)
        return folder

    @staticmethod
    def run(checkout: Path, tools: Path) -> str:
        done = subprocess.run(
            ["bash", checkout / "scripts" / SCRIPT, "--revert"],
            env=os.environ
            | {"PATH": f"{tools}:{os.environ['PATH']}", "LOG": str(tools / "installed")},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    def test_each_checkout_runs_its_own_code(self, tools: Path, tmp_path: Path) -> None:
        first, second = (self.checkout(tmp_path / name) for name in ("first", "second one"))
        for checkout in (first, second, first):
            expected = f"code of {checkout}, root {checkout}, install --revert"
            assert self.run(checkout, tools) == expected
        assert (tools / "installed").read_text().splitlines() == [str(first), str(second)]
        shutil.rmtree(first)
        assert self.run(second, tools).startswith(f"code of {second},")

    def test_environment_is_renewed_with_its_requirements_and_its_python(
        self, tools: Path, tmp_path: Path
    ) -> None:
        checkout = self.checkout(tmp_path / "checkout")
        self.run(checkout, tools)
        with (checkout / "pyproject.toml").open("a") as file:
            file.write("# changed\n")
        self.run(checkout, tools)
        (python,) = (tmp_path / "cache" / "installers").glob("*/bin/python")
        python.unlink()
        self.run(checkout, tools)
        assert (tools / "installed").read_text().splitlines() == 3 * [str(checkout)]

    def test_search_path_of_cd_prints_nothing(
        self, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where CDPATH has a folder, ``cd`` to it also prints it."""
        checkout = self.checkout(tmp_path / "checkout")
        monkeypatch.setenv("CDPATH", str(checkout))
        monkeypatch.chdir(checkout)
        assert self.run(Path(), tools).startswith(f"code of {checkout},")

    def test_packages_of_another_environment_are_not_imported(
        self, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As modules of a cluster set PYTHONPATH for all programs."""
        monkeypatch.setenv("PYTHONPATH", "/opt/others")
        assert self.run(self.checkout(tmp_path / "checkout"), tools).endswith("install --revert")

    def test_outside_a_checkout_is_refused(self, tmp_path: Path) -> None:
        script = tmp_path / "scripts" / SCRIPT
        script.parent.mkdir()
        shutil.copy(REPO / "scripts" / SCRIPT, script)
        done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "not a checkout" in done.stderr


@pytest.mark.parametrize("answer", ["", "no JSON", "["])
def test_interpreter_without_an_answer_is_reported(answer: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{answer}'\n")
    python.chmod(0o755)
    with pytest.raises(NoEnvironmentError, match="does not run"):
        probe(python)


def test_release_comes_from_the_index_of_pip(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """uv reads no setting of pip; and no command line has the index, which may have a password."""
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://u:p@mirror.test/simple")
    asked: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(Runner, "run", lambda _, argv, env=None: asked.append((argv, env or {})))
    line = load(REPO).line["0.26"]
    _install_release(tmp_path / "lock.txt", line, line.python, tmp_path / "python")
    ((argv, env),) = asked
    assert env == {"UV_DEFAULT_INDEX": "http://u:p@mirror.test/simple"}
    assert not any("mirror.test" in word for word in argv)
