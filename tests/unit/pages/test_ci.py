"""CI files: valid for the services, safe by zizmor, and they run what they say.

Both checkers are offline; the schemas are those that check-jsonschema carries. Neither GitHub nor
Buildkite has run any of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import check_jsonschema
import pytest
import yaml
from click.testing import CliRunner

from vllm_forge import cli
from vllm_forge.cli import main
from vllm_forge.commands.parsers import parse
from vllm_forge.errors import UsageError
from vllm_forge.pages.ci import WORKFLOWS, buildkite, github_ci, github_release
from vllm_forge.project import Project

BIN = Path(sys.executable).parent
REASON = "no host yet\"; touch planted; echo $(touch planted) `touch planted` 'x'"
FAKE = '#!/bin/sh\nprintf "%s\\n" "$@" > "$ARGV"\n'
CELL = {"SKU": "b300", "LINE": "0.26"}


def valid(schema: str, path: Path) -> bool:
    argv = ["--builtin-schema", f"vendor.{schema}", str(path)]
    result = CliRunner().invoke(check_jsonschema.main, argv)
    assert result.exit_code in {0, 1}, result.output
    return result.exit_code == 0


def findings(folder: Path) -> set[str]:
    """Names of zizmor's findings, of any severity."""
    argv = [str(BIN / "zizmor"), "--offline", "--no-config", "--format=plain", "--color=never"]
    done = subprocess.run([*argv, str(folder)], capture_output=True, text=True, check=False)
    assert "completed" in done.stderr, done.stderr
    heads = (line.partition("]")[0] for line in done.stdout.splitlines() if "]: " in line[:60])
    found = {head.partition("[")[2] for head in heads}
    assert bool(found) == (done.returncode != 0), done.stdout
    return found


@pytest.fixture
def copy(tmp_path: Path, root: Path) -> Path:
    """A checkout with the rows and the workflows."""
    shutil.copy(root / "matrix.toml", tmp_path)
    shutil.copytree(root / ".github", tmp_path / ".github")
    return tmp_path


@pytest.fixture(scope="module")
def jobs() -> dict[str, dict[str, Any]]:
    """Jobs of both workflows by name."""
    project = Project(Path(__file__).parents[3])
    documents = [yaml.safe_load(make(project)) for make in (github_ci, github_release)]
    assert all(document["permissions"] == {} for document in documents)
    return {name: job for document in documents for name, job in document["jobs"].items()}


@pytest.mark.parametrize("name", ["ci", "release"])
def test_workflow_is_valid(root: Path, name: str) -> None:
    assert valid("github-workflows", root / WORKFLOWS / f"{name}.yml")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    runs-on: ubuntu-24.04\n", ""),
        ("    steps:\n", "    step:\n"),
        ("timeout-minutes: 90", "timeout-minutes: long"),
        ("contents: read", "contents: reed"),
    ],
)
def test_invalid_workflow_is_refused(copy: Path, old: str, new: str) -> None:
    path = copy / WORKFLOWS / "ci.yml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert not valid("github-workflows", path)


def test_dependabot_file_is_valid(copy: Path) -> None:
    path = copy / ".github/dependabot.yml"
    assert valid("dependabot", path)
    text = path.read_text()
    for folder in ("/docker/locks", "/tests/gpu", "/tests/patches", "/tests/toolkit"):
        assert folder in text
    path.write_text(text.replace("interval: weekly", "interval: often"))
    assert not valid("dependabot", path)


def test_workflows_have_no_findings(copy: Path) -> None:
    assert findings(copy / ".github") == set()


@pytest.mark.parametrize(
    ("audit", "name", "old", "new"),
    [
        ("unpinned-uses", "ci.yml", "@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1", "@v7"),
        ("template-injection", "release.yml", '--stage "$STAGE"', "--stage ${{ inputs.reason }}"),
        ("artipacked", "ci.yml", "persist-credentials: false", "fetch-depth: 1"),
        ("excessive-permissions", "ci.yml", ":\n      contents: read", ": write-all"),
        ("dangerous-triggers", "ci.yml", "pull_request:", "pull_request_target:"),
    ],
)
def test_unsafe_workflow_is_refused(copy: Path, audit: str, name: str, old: str, new: str) -> None:
    path = copy / WORKFLOWS / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert audit in findings(copy / ".github")


def test_only_checkout_is_of_others(jobs: dict[str, dict[str, Any]]) -> None:
    uses = {step["uses"].partition("@")[0] for job in jobs.values() for step in job["steps"]
            if "uses" in step}  # fmt: skip
    assert uses == {"actions/checkout"}


def test_gpu_suites_run_on_hosts_of_their_sku_and_on_request(
    root: Path, jobs: dict[str, dict[str, Any]]
) -> None:
    gpu = jobs["gpu"]
    matrix = Project(root).matrix
    rows = [(row["sku"], row["line"]) for row in gpu["strategy"]["matrix"]["include"]]
    expected = {(sku, name) for name, line in matrix.line.items() for sku in line.skus}
    assert len(rows) == len(set(rows)) and set(rows) == expected
    assert gpu["runs-on"] == ["self-hosted", "${{ matrix.sku }}"]
    assert gpu["if"] == "github.event_name == 'workflow_dispatch'"  # never of a fork's change
    others = [job["runs-on"] for name, job in jobs.items() if name != "gpu"]
    assert set(others) == {"ubuntu-24.04"}


def run_script(script: str, folder: Path, **env: str) -> list[str]:
    """The arguments of the last python3 that a step starts."""
    fake, argv = folder / "python3", folder / "argv"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    environment = env | {"PATH": f"{folder}:{os.environ['PATH']}", "ARGV": str(argv)}
    subprocess.run(["bash", "-ec", script], check=True, cwd=folder, env=environment)
    assert not (folder / "planted").exists()
    return argv.read_text().splitlines()


def require_command(argv: list[str], session: str) -> None:
    """It is `python3 -m nox -s SESSION -- ARGUMENTS` with arguments that vllm-forge takes."""
    assert argv[:5] == ["-m", "nox", "-s", session, "--"]
    group = {"forge": [], "test-gpu": ["gpu", "test"], "release": ["release"]}[session]
    parse(cli._parser(), [*group, *argv[5:]])


def test_release_passes_inputs_as_arguments(
    tmp_path: Path, jobs: dict[str, dict[str, Any]]
) -> None:
    step = jobs["release"]["steps"][-1]
    assert set(step["env"]) == {"CELL", "STAGE", "WAIVE", "UNTIL", "REASON"}
    runner = {
        "GITHUB_REPOSITORY": "Owner/Forge", "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_WORKFLOW_REF": "Owner/Forge/.github/workflows/release.yml@refs/heads/main",
    }  # fmt: skip
    inputs = {"CELL": "b300 0.26", "STAGE": "release", "WAIVE": "", "UNTIL": "", "REASON": ""}
    argv = run_script(step["run"], tmp_path, **runner, **inputs)
    require_command(argv, "release")
    assert argv[5:13] == [
        "--sku", "b300", "--line", "0.26", "--stage", "release",
        "--registry", "ghcr.io/owner/forge",
    ]  # fmt: skip
    assert "https://github.com/Owner/Forge/.github/workflows/release.yml@refs/heads/main" in argv
    assert "--waive" not in argv
    inputs |= {"WAIVE": "kernel", "UNTIL": "2027-01-31", "REASON": REASON}
    argv = run_script(step["run"], tmp_path, **runner, **inputs)
    require_command(argv, "release")
    assert argv[-6:] == ["--waive", "kernel", "--until", "2027-01-31", "--reason", REASON]


def test_gpu_steps_are_commands(tmp_path: Path, jobs: dict[str, dict[str, Any]]) -> None:
    build, suite = (step["run"] for step in jobs["gpu"]["steps"][-2:])
    env = CELL | {"HOME": str(tmp_path), "GITHUB_SHA": "1d" * 20}
    require_command(run_script(build, tmp_path, **env), "forge")
    argv = run_script(suite, tmp_path, **env)
    require_command(argv, "test-gpu")
    assert argv[-1] == f"{tmp_path}/gpu-results/{'1d' * 20}/b300-0.26"


def test_new_pin_stays_current(copy: Path) -> None:
    project = Project(copy)
    for name, make in (("ci", github_ci), ("release", github_release)):
        path = copy / WORKFLOWS / f"{name}.yml"
        text = path.read_text()
        assert make(project) == text
        bumped = text.replace("3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1",
                              f"{'a1' * 20} # v8.0.0")  # fmt: skip
        path.write_text(bumped)
        assert make(project) == bumped != text


@pytest.mark.parametrize("pin", ["@v8", f"@{'a' * 39} # v8.0.0", f"@{'a' * 40}"])
def test_pin_that_is_not_a_commit_is_refused(copy: Path, pin: str) -> None:
    path = copy / WORKFLOWS / "release.yml"
    old = "@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1"
    path.write_text(path.read_text().replace(old, pin))
    with pytest.raises(UsageError, match="one pin"):
        github_release(Project(copy))
    path.unlink()
    with pytest.raises(UsageError, match="one pin"):
        github_release(Project(copy))


def test_buildkite_pipeline_is_valid(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ci", "buildkite"]) == 0
    text = capsys.readouterr().out
    assert text == buildkite(Project(root))
    path = tmp_path / "pipeline.yml"
    path.write_text(text)
    assert valid("buildkite", path)
    for old, new in (("- label: check", "- labl: check"), ("command: bash", "script: bash"),
                     ("timeout_in_minutes: 360", "timeout_in_minutes: long")):  # fmt: skip
        assert old in text
        path.write_text(text.replace(old, new))
        assert not valid("buildkite", path), old


def test_buildkite_steps_are_commands(tmp_path: Path, root: Path) -> None:
    """``$$`` is what the agent's upload makes ``$`` of; a single ``$`` would be its own."""
    text = buildkite(Project(root))
    assert "$" not in text.replace("$$", "")
    steps = yaml.safe_load(text.replace("$$", "$"))["steps"]
    suites = [step for step in steps if "sku" in step.get("agents", {})]
    assert suites
    for step in suites:
        assert step["agents"] == {"queue": "gpu", "sku": step["env"]["SKU"]}
        assert "pull_request" in step["if"]
        for command, session in zip(step["commands"], ("forge", "test-gpu"), strict=True):
            require_command(run_script(command, tmp_path, **step["env"]), session)
