"""Make the kit of the kernel tier: a folder to carry to a host that has a GPU and no vLLM.

    python -m tests.support.prepare_race dist/gpu/race [--line 0.26] [--torch DIR]

It holds the wheel's libraries without the device code that cannot run there, what of the release's
source the mutants are compiled from, and, if this machine has nvcc and that torch, the helpers and
mutants already compiled. ``manifest.json`` says what of all this has which digest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from tests.gpu.race.build import build_all, toolchain
from tests.gpu.race.kit import ARCHIVE, BASE, MANIFEST, MOE, REPO
from tests.gpu.race.mutants import SOURCES
from vllm_forge.gputest.wheels import thin
from vllm_forge.host import atomic_path
from vllm_forge.kernels.coverage import parse_capability
from vllm_forge.matrix import load
from vllm_forge.sources import SourceRepo, Wheelhouse, read_lock


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def libraries(line_name: str, folder: Path, capability: tuple[int, int]) -> dict[str, Any]:
    """The line's libraries, from its locked wheel; patches change no compiled file."""
    matrix = load(REPO)
    lock = read_lock(REPO, line_name, matrix.line[line_name], matrix.base)
    wheel = next(wheel for wheel in lock.wheels if wheel.name == "vllm")
    folder.mkdir(parents=True)
    rows = {}
    with zipfile.ZipFile(Wheelhouse().verify(wheel)) as archive:
        for name in (MOE, BASE):
            content = archive.read(f"vllm/{name}")
            thinned, zeroed = thin(content, name, capability)
            (folder / name).write_bytes(thinned)
            digest = hashlib.sha256(content).hexdigest()
            rows[name] = {"sha256": digest, "zeroed_bytes": zeroed}
    return {"wheel": wheel.filename, "wheel_sha256": wheel.sha256, "libraries": rows}


def source(line_name: str, folder: Path) -> str:
    """The release's files that mutants are made of; the tree's hash."""
    repo, release = SourceRepo(), load(REPO).line[line_name].vllm
    if (tree := repo.tree(release)) is None:
        raise SystemExit(
            f"the source of {release} is not in the cache: `nox -s patches` fetches it"
        )
    folder.mkdir(parents=True)
    packed = repo.git("archive", tree, *SOURCES).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed, check=True)
    return tree


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.support.prepare_race", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--line", default=None)
    parser.add_argument("--capability", default="9.0")
    parser.add_argument("--torch", type=Path, help="folder of the line's torch, with its headers")
    args = parser.parse_args(argv)
    capability = parse_capability(args.capability)
    line_name = args.line or load(REPO).default_line
    args.folder.mkdir(parents=True, exist_ok=True)
    chain = toolchain((f"{capability[0]}{capability[1]}a",), args.torch)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        kit = Path(scratch)
        made: dict[str, Any] = {"line": line_name, "capability": args.capability}
        made |= libraries(line_name, kit / "lib", capability)
        made["source_tree"] = source(line_name, kit / "source")
        if chain is not None:
            # Kept beside the archive: what did not change is not compiled again.
            built = build_all(args.folder / "native", kit / "source", chain)
            failed = {name: row["error"] for name, row in built.items() if "error" in row}
            if failed:
                raise SystemExit(json.dumps(failed, indent=1))
            shutil.copytree(
                args.folder / "native", kit / "native", ignore=shutil.ignore_patterns("*.part")
            )
            said = subprocess.run(
                [str(chain.nvcc), "--version"], capture_output=True, text=True, check=True
            )
            made["nvcc"] = said.stdout.strip().splitlines()[-2]
            made["native"] = {
                name: {"sha256": sha256(kit / "native" / row["library"])} | row
                for name, row in built.items()
            }
        with atomic_path(args.folder / ARCHIVE) as aside, tarfile.open(aside, "w:xz") as tar:
            for path in sorted(kit.iterdir()):
                tar.add(path, arcname=path.name)
        with atomic_path(args.folder / MANIFEST) as aside:
            aside.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    size = (args.folder / ARCHIVE).stat().st_size
    print(f"{args.folder / ARCHIVE}: {size / 1e6:.1f} MB; compiled: {'native' in made}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
