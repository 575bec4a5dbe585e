"""A small project: its own matrix, a package index on loopback, a tiny "vllm" to patch.

Everything that vllm-forge does with it is real: uv resolves it, git patches it, an engine
builds it; only the packages are small.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.fatbins import entry, fatbin, library
from tests.support.index_server import IndexServer, Served
from tests.support.trees import write_sdist
from tests.support.wheels import Member, write_wheel
from vllm_forge.cli import main
from vllm_forge.patches import authoring
from vllm_forge.project import Project as ForgeProject
from vllm_forge.sources import SourceRepo

REPO = Path(__file__).parents[2]
RELEASE = "0.1.0"
BASE_LOCK = "docker/locks/debian.txt"

VLLM = {
    "vllm/__init__.py": "from ._version import __version__\n",
    "vllm/_version.py": (
        f"__version__ = version = '{RELEASE}'\n"
        f"__version_tuple__ = version_tuple = ({', '.join(RELEASE.split('.'))})\n"
    ),
    "vllm/entrypoints/__init__.py": "",
    "vllm/entrypoints/cli.py": (
        "import argparse, json, urllib.request\n\nimport vllm\n\n\ndef main():\n"
        "    parser = argparse.ArgumentParser('vllm')\n"
        "    parser.add_argument('-v', '--version', action='version', version=vllm.__version__)\n"
        "    commands = parser.add_subparsers()\n"
        "    commands.add_parser('serve')\n"
        "    bench = commands.add_parser('bench').add_subparsers().add_parser('serve')\n"
        "    bench.add_argument('--base-url')\n"
        "    bench.add_argument('--result-dir')\n"
        "    args, _ = parser.parse_known_args()\n"
        "    if 'base_url' in args:\n"
        "        body = json.dumps({'max_tokens': 4}).encode()\n"
        "        url = args.base_url + '/v1/completions'\n"
        "        answers = [urllib.request.urlopen(url, body).read() for _ in range(2)]\n"
        "        tokens = sum(answer.count(b'w1') for answer in answers)\n"
        "        with open(args.result_dir + '/result.json', 'w') as file:\n"
        "            json.dump({'completed': 2, 'total_output_tokens': tokens}, file)\n"
    ),
    "vllm/model_executor/__init__.py": "",
    "vllm/model_executor/layers/__init__.py": "",
    "vllm/model_executor/layers/quantization/__init__.py": "",
    "vllm/model_executor/layers/quantization/fp8.py": (
        "def is_static(args):\n"
        "    # the flag of a group without activations\n"
        "    static = args and not args.dynamic\n"
        "    return static\n"
    ),
}
PATCHED = "vllm/model_executor/layers/quantization/fp8.py"
MESSAGE = """the flag is a bool

Origin: vendor, written for the tests
Bug: https://example.invalid/1
Forwarded: not-needed
Applied-Upstream: no
Author: tests
Last-Update: 2026-01-01
Skus: all
Proves: tests/patches/test_flag.py::test_is_bool
Drop-When: never
Patch: 0001-flag.patch
"""

# A library with device code: the bytes of each architecture can be told apart.
LIBRARY = "torch/lib/libtiny_cuda.so"
LIBRARY_SIZE = 1 << 20
CODE = {80: b"\x80" * 4096, 100: b"\xa0" * 4096, 120: b"\xc0" * 4096}

MATRIX = """
schema_version = 1
default_line = "mini"

[base]
suite = "trixie"
packages = ["ca-certificates", "python3"]
platform = "x86_64-manylinux_2_35"
source_date_epoch = 1735689600
budget_mb = 100

[container]
shm_gb = 1
ulimits = []
port = 8000

[cuda."13.0"]
driver = "580.65.06"
source = "release notes"

[[layers]]
name = "torch"
match = ["torch"]
code = true

[[layers]]
name = "environment"
match = ["*"]

[sku.alpha]
arch = "sm_100a"
compute_capability = "10.0"
device = "NVIDIA Alpha"
memory_gb = 1
env = { TORCH_CUDA_ARCH_LIST = "10.0a" }

[sku.beta]
arch = "sm_120"
compute_capability = "12.0"
device = "NVIDIA Beta"
memory_gb = 1

[line.mini]
vllm = "0.1.0"
torch = "2.0.0"
python = "3.13"
cuda = "13.0"
lock = "docker/locks/mini.txt"
series = "patches/vllm/mini"
skus = ["alpha", "beta"]
budget_mb = 120

[artifact]

[preset]
"""


@dataclass
class Project:
    """A checkout with its own cache and index."""

    root: Path
    cache: Path
    index: IndexServer

    @property
    def environment(self) -> dict[str, str]:
        """Variables for commands of this project."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("UV_", "PIP_"))}
        return kept | {
            "PYTHONPATH": str(REPO / "src"),  # not what another checkout has installed
            "VLLM_FORGE_ROOT": str(self.root),
            "VLLM_FORGE_CACHE": str(self.cache),
            "UV_DEFAULT_INDEX": self.index.url,
            "UV_CACHE_DIR": str(self.cache / "uv"),
            "no_proxy": "127.0.0.1",
        }

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        """Start one vllm-forge command; stderr is a pipe."""
        return subprocess.Popen(
            [sys.executable, "-m", "vllm_forge", *args],
            env=self.environment | env,
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        """Run one vllm-forge command and check its exit code."""
        process = self.start(*args, **env)
        out, err = process.communicate()
        assert process.returncode == code, f"exit {process.returncode}, wanted {code}\n{out}\n{err}"
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def call(self, *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """The same in this process: no second of its own for imports."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            for name in ("VLLM_FORGE_ROOT", "VLLM_FORGE_CACHE", "UV_DEFAULT_INDEX",
                         "UV_CACHE_DIR", "no_proxy"):  # fmt: skip
                patch.setenv(name, self.environment[name])
            done = main(args)
        assert done == code, f"exit {done}, wanted {code}\n{out.getvalue()}\n{err.getvalue()}"
        return subprocess.CompletedProcess(args, done, out.getvalue(), err.getvalue())

    def copy(self, folder: Path, *kept: str) -> Project:
        """This project in ``folder``, without images and with only the ``kept`` caches."""
        made = Project(root=folder / "checkout", cache=folder / "cache", index=self.index)
        shutil.copytree(self.root, made.root, ignore=shutil.ignore_patterns("dist"))
        for name in kept:
            shutil.copytree(self.cache / name, made.cache / name, symlinks=True)
        return made

    def lock_base(self) -> None:
        """Lock the Debian packages that this host's archives have."""
        matrix = self.root / "matrix.toml"
        row = f'[base]\nlock = "{BASE_LOCK}"\n'
        matrix.write_text(matrix.read_text().replace("[base]\n", row))
        self.run("wheels", "lock", "--base")

    def lend(self, other: Project, *names: str) -> None:
        """Give another project what its caches of these names lack."""
        for name in names:
            for kept in (self.cache / name).iterdir():
                copy = other.cache / name / kept.name
                if not copy.exists():
                    shutil.copytree(kept, copy, symlinks=True)

    def record(self, cell: str) -> dict[str, Any]:
        """The record beside a finished image."""
        result: dict[str, Any] = json.loads((self.root / "dist" / f"{cell}.json").read_text())
        return result

    def patch(self, replacement: str) -> None:
        """Make the one patch of the series change the flag's line to ``replacement``."""
        series = self.root / "patches" / "vllm" / "mini"
        if series.exists():
            self.call("patch", "check", "--line", "mini")
        else:
            series.mkdir(parents=True)
            (series / "series").touch()
            self.call("patch", "lock", "--line", "mini")
        checkout = ForgeProject(self.root)
        work = self.root.parent / "authoring"
        authoring.checkout(checkout, "mini", SourceRepo(self.cache / "sources.git"), work)
        text = VLLM[PATCHED].replace("args and not args.dynamic", replacement)
        for command in (["reset", "-q", "--hard", authoring.BASE], ["commit", "-qaF", "-"]):
            user = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
            subprocess.run(["git", "-C", work, *user, *command], input=MESSAGE.encode(), check=True)
            (work / PATCHED).write_text(text)
        authoring.export(checkout, work)
        shutil.rmtree(work)


def make_project(
    folder: Path,
    files: dict[str, str] | None = None,
    more: dict[str, bytes] | None = None,
    flashinfer: dict[str, bytes] | None = None,
    base: Project | None = None,
) -> Project:
    """A locked and patched project in ``folder``.

    ``files`` replace those of the tiny vllm; another wheel also has ``more``; one more wheel is of
    the files of a ``flashinfer``. The Debian packages, rootfs and system are those of ``base``.
    """
    root = folder / "checkout"
    (root / "docker" / "locks").mkdir(parents=True)
    for name in ("Dockerfile", "libcuda-functions.txt"):
        shutil.copy(REPO / "docker" / name, root / "docker" / name)
    (root / "matrix.toml").write_text(MATRIX)
    if base is not None:
        for shared in ("matrix.toml", BASE_LOCK):
            shutil.copy(base.root / shared, root / shared)
    source = {path: text.encode() for path, text in (VLLM | (files or {})).items()}
    code = library(fatbin(*(entry("cubin", str(arch), CODE[arch]) for arch in CODE)))
    torch = {
        "torch/__init__.py": b"__version__ = '2.0.0+cu130'\n",
        LIBRARY: code + bytes(LIBRARY_SIZE),
    }
    index = IndexServer().start()
    packages = (
        ("torch", "2.0.0", torch, ()),
        ("sixlike", "1.0", {"sixlike.py": b"x = 1\n" * 1000} | (more or {}), ()),
        (
            "vllm",
            RELEASE,
            source,
            ("torch", "sixlike", *(["flashinfer-python"] * bool(flashinfer))),
        ),
        *([("flashinfer-python", "0.1", flashinfer, ())] if flashinfer else []),
    )
    for name, version, contents, requires in packages:
        path = write_wheel(
            folder / "packages" / f"{name.replace('-', '_')}-{version}-py3-none-any.whl",
            name.replace("-", "_"), version,
            [Member(path=file, content=content) for file, content in contents.items()],
            entry_points="[console_scripts]\nvllm = vllm.entrypoints.cli:main\n"
            if name == "vllm"
            else "",
            requires=requires,
        )  # fmt: skip
        index.add(name, path.name, Served(content=path.read_bytes()))
    archive = write_sdist(
        folder / "packages" / f"vllm-{RELEASE}.tar.gz",
        source | {"tests/test_x.py": b"", "setup.py": b""},
        top=f"vllm-{RELEASE}",
    )
    index.add("vllm", archive.name, Served(content=archive.read_bytes()))
    project = Project(root=root, cache=folder / "cache", index=index)
    if base is not None:
        base.lend(project, "rootfs", "systems")
    project.call("wheels", "lock", "--line", "mini")
    project.patch("args is not None and not args.dynamic")
    return project
