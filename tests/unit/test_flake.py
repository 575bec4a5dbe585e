"""flake.nix, evaluated by Nix against names of packages, without network and the real nixpkgs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
NIXPKGS = REPO / "tests" / "fixtures" / "nixpkgs"
TWIN = """
[sku.testchip]
arch = "sm_120"
"""
pytestmark = pytest.mark.skipif(
    shutil.which("nix") is None, reason="needs Nix: nox -s test -- --provision, or get nix-bin"
)


class Flake:
    """A copy of the flake, and a Nix with a store and a state of its own."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "flake"
        self.path.mkdir()
        for name in ("flake.nix", "matrix.toml"):
            shutil.copy(REPO / name, self.path)
        shutil.copytree(NIXPKGS, folder / "nixpkgs")
        self.options = [
            "--offline", "--no-write-lock-file",
            "--override-input", "nixpkgs", f"path:{folder / 'nixpkgs'}",
        ]  # fmt: skip
        places = {
            f"NIX_{name.upper()}_DIR": str(folder / name)
            for name in ("store", "state", "log", "conf")
        }
        self.environment = os.environ | places | {
            "HOME": str(folder),
            "NIX_CONFIG": "experimental-features = nix-command flakes\nsandbox = false\n"
            "build-users-group =\nsubstituters =",
        }  # fmt: skip

    def nix(
        self, *command: str, output: str = "", more: tuple[str, ...] = (), cwd: Path = REPO
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nix", *command, *self.options, f"path:{self.path}{output}", *more],
            env=self.environment, capture_output=True, text=True, check=False, cwd=cwd,
        )  # fmt: skip

    def change(self, file: str, old: str, new: str) -> None:
        text = (self.path / file).read_text()
        assert old in text
        (self.path / file).write_text(text.replace(old, new))

    def apps(self) -> set[str]:
        more = ("--json", "--apply", "builtins.attrNames")
        done = self.nix("eval", output="#apps.x86_64-linux", more=more)
        assert done.returncode == 0, done.stderr
        return set(json.loads(done.stdout))


@pytest.fixture
def flake(tmp_path: Path) -> Flake:
    return Flake(tmp_path)


def test_flake_evaluates(flake: Flake) -> None:
    done = flake.nix("flake", "check", "--no-build")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("pkgs.skopeo", "pkgs.skopoe"),
        ("packages.virtualenv", "packages.virtualnev"),
        ("pkgs.codespell", "pkgs.kodespell"),
        ("pkgs.stdenv.cc.cc.lib", "pkgs.stdenv.cc.lib"),
        (".sku;", ".skus;"),
    ],
)
def test_misspelt_attribute_is_found(flake: Flake, right: str, wrong: str) -> None:
    flake.change("flake.nix", right, wrong)
    done = flake.nix("flake", "check", "--no-build")
    assert done.returncode == 1
    missing = wrong.rpartition(".")[2].rstrip(";")
    assert f"attribute '{missing}' missing" in done.stderr


def test_apps_are_nox_sessions(flake: Flake) -> None:
    """Also where two SKUs share an arch."""
    with (flake.path / "matrix.toml").open("a") as file:
        file.write(TWIN)
    shutil.copy(REPO / "noxfile.py", flake.path)
    argv = [sys.executable, "-m", "nox", "-l"]
    listed = subprocess.run(argv, cwd=flake.path, capture_output=True, text=True, check=True)
    sessions = set(re.findall(r"^- (build-\S+)", listed.stdout, re.MULTILINE))
    assert {"build-testchip", "build-rtxpro6000", "build-sm103a"} <= sessions
    assert flake.apps() == sessions | {"default"}


def test_app_starts_its_session(flake: Flake, tmp_path: Path) -> None:
    done = flake.nix("run", output="#build-sm120", more=("--", "--line", "0.33"))
    assert done.stdout == "nox -s build-sm120 -- --line 0.33\n", done.stderr
    done = flake.nix("run", more=("--", "plan"), cwd=tmp_path)
    assert done.returncode == 2
    assert "forge: not a checkout of vllm-forge" in done.stderr
