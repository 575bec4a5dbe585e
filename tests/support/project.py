"""A small project: its own matrix, a package index on loopback, a tiny "vllm" to patch.

Everything that vllm-forge does with it is real: uv resolves it, git patches it, an engine
builds it; only the packages are small.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.fatbins import entry, fatbin, library

if TYPE_CHECKING:
    from collections.abc import Mapping

REPO = Path(__file__).parents[2]
RELEASE = "0.1.0"

VLLM = {
    "vllm/__init__.py": "from ._version import __version__\n",
    "vllm/_version.py": (
        f"__version__ = version = '{RELEASE}'\n"
        f"__version_tuple__ = version_tuple = ({', '.join(RELEASE.split('.'))})\n"
    ),
    "vllm/entrypoints/__init__.py": "",
    "vllm/entrypoints/cli.py": (
        "import argparse\n\nimport vllm\n\n\ndef main():\n"
        "    parser = argparse.ArgumentParser('vllm')\n"
        "    parser.add_argument('-v', '--version', action='version', version=vllm.__version__)\n"
        "    commands = parser.add_subparsers()\n"
        "    commands.add_parser('serve')\n"
        "    commands.add_parser('bench').add_subparsers().add_parser('serve')\n"
        "    parser.parse_args()\n"
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
PATCH_HEAD = """Description: the flag is a bool
Origin: vendor, written for the tests
Bug: https://example.invalid/1
Forwarded: not-needed
Applied-Upstream: no
Author: tests
Last-Update: 2026-01-01
Skus: all
Proves: tests/patches/test_flag.py::test_is_bool
Drop-When: never
---
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


def wheel(
    name: str, version: str, files: Mapping[str, str | bytes], extra: dict[str, str]
) -> bytes:
    """A valid wheel; ``extra`` are further files of its dist-info folder."""
    info = f"{name}-{version}.dist-info"
    texts = dict(files) | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + extra.pop("requires", ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
        **{f"{info}/{path}": text for path, text in extra.items()},
    }
    content = {
        path: text.encode() if isinstance(text, str) else text for path, text in texts.items()
    }
    rows = []
    for path, data in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
        rows.append(f"{path},sha256={digest.rstrip('=')},{len(data)}")
    rows.append(f"{info}/RECORD,,")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in [*content.items(), (f"{info}/RECORD", "\n".join(rows).encode() + b"\n")]:
            member = zipfile.ZipInfo(path, (2025, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_DEFLATED
            member.external_attr = 0o100644 << 16
            archive.writestr(member, data)
    return out.getvalue()


def sdist(files: dict[str, str]) -> bytes:
    """A source archive with the files below one folder."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for path, text in files.items():
            member = tarfile.TarInfo(f"vllm-{RELEASE}/{path}")
            member.size = len(text.encode())
            member.mode = 0o644
            archive.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


class Index:
    """A simple-API index (PEP 691) on a free port of loopback."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.requests: list[str] = []
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.requests.append(self.path)
                parts = self.path.strip("/").split("/")
                if parts[0] == "simple":
                    self._send(index.page(parts[1]), "application/vnd.pypi.simple.v1+json")
                elif parts[-1] in index.files:
                    self._send(index.files[parts[-1]], "application/octet-stream")
                else:
                    self.send_error(404)

            do_HEAD = do_GET

            def _send(self, body: bytes, kind: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/simple"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def page(self, project: str) -> bytes:
        """The JSON page of a project."""
        rows = [
            {
                "filename": name,
                "url": f"{self.url.removesuffix('/simple')}/files/{name}",
                "hashes": {"sha256": hashlib.sha256(content).hexdigest()},
                "size": len(content),
            }
            for name, content in self.files.items()
            if name.startswith(f"{project}-")
        ]
        page = {"meta": {"api-version": "1.1"}, "name": project, "files": rows, "versions": []}
        return json.dumps(page).encode()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Project:
    """A checkout with its own cache and index."""

    root: Path
    cache: Path
    index: Index

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

    def copy(self, folder: Path, *kept: str) -> Project:
        """This project in ``folder``, without images and with only the ``kept`` caches."""
        made = Project(root=folder / "checkout", cache=folder / "cache", index=self.index)
        shutil.copytree(self.root, made.root, ignore=shutil.ignore_patterns("dist"))
        for name in kept:
            shutil.copytree(self.cache / name, made.cache / name, symlinks=True)
        return made

    def record(self, cell: str) -> dict[str, Any]:
        """The record beside a finished image."""
        result: dict[str, Any] = json.loads((self.root / "dist" / f"{cell}.json").read_text())
        return result

    def patch(self, replacement: str) -> None:
        """Make the one patch of the series change the flag's line to ``replacement``."""
        before = VLLM[PATCHED]
        after = before.replace("args and not args.dynamic", replacement)
        folder = self.root / "patches" / "vllm" / "mini"
        folder.mkdir(parents=True, exist_ok=True)
        work = self.root.parent / "authoring"
        shutil.rmtree(work, ignore_errors=True)
        (work / PATCHED).parent.mkdir(parents=True)
        git = ["git", "-C", str(work), "-c", "user.name=t", "-c", "user.email=t@localhost"]
        subprocess.run([*git, "init", "-q"], check=True)
        (work / PATCHED).write_text(before)
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-qm", "base"], check=True)
        (work / PATCHED).write_text(after)
        diff = subprocess.run(
            [*git, "diff", "--full-index"], check=True, capture_output=True, text=True
        ).stdout
        (folder / "series").write_text("0001-flag.patch\n")
        (folder / "0001-flag.patch").write_text(PATCH_HEAD + diff)
        self.run("patch", "lock", "--line", "mini")


def make_project(folder: Path, files: dict[str, str] | None = None) -> Project:
    """A locked and patched project in ``folder``; ``files`` replace those of the tiny vllm."""
    root = folder / "checkout"
    (root / "docker" / "locks").mkdir(parents=True)
    shutil.copy(REPO / "docker" / "Dockerfile", root / "docker" / "Dockerfile")
    (root / "matrix.toml").write_text(MATRIX)
    source = VLLM | (files or {})
    scripts = {
        "entry_points.txt": "[console_scripts]\nvllm = vllm.entrypoints.cli:main\n",
        "requires": "Requires-Dist: torch\nRequires-Dist: sixlike\n",
    }
    index = Index(
        {
            f"vllm-{RELEASE}-py3-none-any.whl": wheel("vllm", RELEASE, source, scripts),
            f"vllm-{RELEASE}.tar.gz": sdist(source | {"tests/test_x.py": "", "setup.py": ""}),
            "torch-2.0.0-py3-none-any.whl": wheel(
                "torch",
                "2.0.0",
                {
                    "torch/__init__.py": "__version__ = '2.0.0+cu130'\n",
                    LIBRARY: library(
                        fatbin(*(entry("cubin", str(arch), CODE[arch]) for arch in CODE))
                    )
                    + bytes(LIBRARY_SIZE),
                },
                {},
            ),
            "sixlike-1.0-py3-none-any.whl": wheel(
                "sixlike", "1.0", {"sixlike.py": "x = 1\n" * 1000}, {}
            ),
        }
    )
    project = Project(root=root, cache=folder / "cache", index=index)
    project.run("wheels", "lock", "--line", "mini")
    project.patch("args is not None and not args.dynamic")
    return project
