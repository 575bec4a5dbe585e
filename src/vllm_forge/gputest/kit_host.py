"""A kit on its host: take parts, join them, make an environment beside the host's, run the suite.

    kit.py take               keep the parts next to this file; again for the next ones
    kit.py go OUTPUT [ARG]... join, install, run; ARG goes to tests.gpu.harness.run

Stands alone on the standard library, and needs no network and no root. Works in FORGE_KIT_WORK
(default: forge-kit in the folder for temporary files). The host's packages are seen behind the
kit's. Ends by itself before FORGE_KIT_LIMIT seconds (default: --limit of gpu-kit), with the results
so far.
"""

from __future__ import annotations

import compileall
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import site
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

HERE = Path(__file__).resolve().parent
WORK = Path(os.environ.get("FORGE_KIT_WORK") or Path(tempfile.gettempdir()) / "forge-kit")
PACKING_S, ENDING_S = 45, 20  # the suite gets SIGTERM that long before the limit; then SIGKILL
CHUNK = 1 << 24
# Of every installed file: FlashInfer builds with ninja, which builds again what is older than its
# sources, and caches that came along are older than an environment that was made now.
INSTALLED = 1577836800  # 2020-01-01


def take(manifest: dict[str, Any]) -> None:
    """Copy the parts beside this file into the work folder, each verified."""
    for part in manifest["parts"]:
        source, target = HERE / part["name"], WORK / part["name"]
        if source.is_file():
            require(source, part)  # first: one that was damaged must not replace one that is good
            aside = target.with_name(f"{target.name}.new")
            try:
                shutil.copyfile(source, aside)
                aside.replace(target)
            finally:
                aside.unlink(missing_ok=True)
    here = [part["name"] for part in manifest["parts"] if is_part(WORK / part["name"], part)]
    print(f"{len(here)} of {len(manifest['parts'])} parts are here: {' '.join(here)}")


def is_part(path: Path, part: dict[str, Any]) -> bool:
    """Whether a file is there and has the manifest's size and hash."""
    if not path.is_file() or path.stat().st_size != part["size"]:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return bool(digest.hexdigest() == part["sha256"])


def require(path: Path, part: dict[str, Any]) -> None:
    """End unless it is the manifest's."""
    if not is_part(path, part):
        sys.exit(f"{part['name']} does not match the manifest: copy it again")


def kit_id(manifest: dict[str, Any]) -> str:
    """Distinguish this kit, on this Python, from others that left something in the work folder."""
    said = json.dumps([sys.version, [part["sha256"] for part in manifest["parts"]]])
    return hashlib.sha256(said.encode()).hexdigest()


def is_complete(folder: Path, kit: str) -> bool:
    """Whether an earlier call completed a folder of this kit."""
    stamp = folder / ".complete"
    return stamp.is_file() and stamp.read_text() == kit


class Joined:
    """The parts as one file to read from, without a copy on disk."""

    def __init__(self, paths: list[Path]) -> None:
        self.files: list[BinaryIO] = [path.open("rb") for path in paths]

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes of the first file that has some left."""
        while self.files:
            if block := self.files[0].read(size):
                return block
            self.files.pop(0).close()
        return b""


def join(manifest: dict[str, Any]) -> Path:
    """Verify all parts and unpack them; the folder of the kit's content."""
    folder, kit = WORK / "content", kit_id(manifest)
    if is_complete(folder, kit):
        return folder
    paths = [WORK / part["name"] for part in manifest["parts"]]
    for path, part in zip(paths, manifest["parts"], strict=True):
        if not path.is_file():
            sys.exit(f"missing {part['name']}: bring it with `take` first")
        require(path, part)
    clear(folder)
    joined: Any = Joined(paths)  # of a stream, tarfile only calls read()
    with tarfile.open(fileobj=joined, mode="r|", bufsize=CHUNK) as tar:
        tar.extractall(folder, filter="data")
    (folder / ".complete").write_text(kit)
    return folder


def clear(folder: Path) -> None:
    """Delete what an earlier call left: its results would pass for those of this one."""
    if folder.exists():
        shutil.rmtree(folder)


def unpack(wheel: Path, prefix: Path, packages: Path) -> None:
    """Put a wheel's files where the wheel format says (PEP 427)."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            target, script = place(member.filename, prefix, packages)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = archive.read(member)
            if script and content.startswith(b"#!python"):
                _, _, rest = content.partition(b"\n")
                content = f"#!{prefix}/bin/python\n".encode() + rest
            target.write_bytes(content)
            os.utime(target, (INSTALLED, INSTALLED))
            if script or member.external_attr >> 16 & 0o111:
                target.chmod(0o755)


def place(name: str, prefix: Path, packages: Path) -> tuple[Path, bool]:
    """Where a member goes, and whether it is a script."""
    head, _, rest = name.partition("/")
    if not head.endswith(".data"):
        return packages / name, False
    kind, _, inner = rest.partition("/")
    folders = {"scripts": prefix / "bin", "headers": prefix / "include", "data": prefix}
    folders |= dict.fromkeys(("purelib", "platlib"), packages)
    return folders[kind] / inner, kind == "scripts"


def environment(folder: Path, kit: str) -> Path:
    """An environment with the kit's wheels before the host's packages; its Python."""
    prefix = WORK / "venv"
    python = prefix / "bin" / "python"
    if is_complete(prefix, kit):
        return python
    clear(prefix)
    venv.EnvBuilder(symlinks=True, with_pip=False).create(prefix)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = prefix / "lib" / version / "site-packages"
    wheels = sorted((folder / "wheels").glob("*.whl"), key=lambda path: -path.stat().st_size)
    with ProcessPoolExecutor() as pool:
        count = len(wheels)
        list(pool.map(unpack, wheels, [prefix] * count, [packages] * count))
    # addsitedir also reads the .pth files there, which a plain path would not.
    rows = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    (packages / "zz-host.pth").write_text("\n".join(rows) + "\n")
    # Many processes start at once, and each would compile what the others do.
    compileall.compile_dir(packages, quiet=2, workers=0)
    (prefix / ".complete").write_text(kit)
    return python


def variables(folder: Path) -> dict[str, str]:
    """The kit's Python first; a CUDA toolkit if the host has one."""
    env = dict(os.environ)
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if Path(nvcc).exists():
        env.setdefault("CUDA_HOME", str(Path(nvcc).resolve().parent.parent))
        env["PATH"] = f"{Path(nvcc).parent}{os.pathsep}{env['PATH']}"
    env["PATH"] = f"{WORK}/venv/bin{os.pathsep}{env['PATH']}"
    env["PYTHONPATH"] = str(folder / "bundle" / "src")
    return env


def unpack_caches(folder: Path, manifest: dict[str, Any]) -> Path:
    """The folder of caches: an earlier call's, or the kit's, unpacked whole or not at all."""
    caches, packed = WORK / "caches", folder / "caches.tar.xz"
    if not caches.exists() and packed.is_file():
        aside = WORK / "caches.new"
        clear(aside)
        with tarfile.open(packed, "r:xz") as tar:
            tar.extractall(aside, filter="data")
        (aside / "caches").rename(caches)
        clear(aside)
        if (place := manifest.get("compiled_at")) not in {None, str(caches)}:
            work = Path(place).parent
            print(f"kernels were compiled at {place}: many are compiled again here", flush=True)
            print(f"unless FORGE_KIT_WORK={work}, as they hold that path", flush=True)
    return caches


def go(
    manifest: dict[str, Any], output: Path, arguments: list[str], start: float, limit: float
) -> int:
    """Join, install, run; results and a tar of all the rest go to ``output``."""
    folder = join(manifest)
    print(f"joined after {time.monotonic() - start:.0f} s", flush=True)
    python = environment(folder, kit_id(manifest))
    print(f"installed after {time.monotonic() - start:.0f} s", flush=True)
    results = WORK / "results"
    clear(results)
    output.mkdir(parents=True, exist_ok=True)  # now: it may be refused
    caches = unpack_caches(folder, manifest)
    bundle = folder / "bundle"
    # On SIGTERM, the suite is ended and results so far are still written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    minutes = [] if "--minutes" in arguments else ["--minutes", str(manifest["minutes"])]
    process = subprocess.Popen(
        [
            str(python), "-m", "tests.gpu.harness.run", str(bundle / "plan.json"), str(results),
            "--caches", str(caches), *minutes, *arguments,
        ],
        cwd=bundle,
        env=variables(folder),
        start_new_session=True,
    )  # fmt: skip
    try:
        code = process.wait(timeout=max(1.0, limit - PACKING_S - (time.monotonic() - start)))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        print(f"stopped after {time.monotonic() - start:.0f} s", flush=True)
        process.terminate()
        code = 124
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=ENDING_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # servers that tests left, too
    for path in [*results.glob("*.json"), *results.glob("*.txt"), *results.glob("*.xml")]:
        shutil.copyfile(path, output / path.name)
    largest = int(manifest["max_result"])
    if results.is_dir():
        pack(results, output / "results.tar.xz", largest)
    if os.environ.get("FORGE_KIT_CACHES") and caches.is_dir():
        pack(caches, output / "caches.tar.xz", largest)
    return code


def pack(folder: Path, target: Path, largest: int) -> None:
    """Compress a folder; cut into files ``.00``, ``.01`` of at most ``largest`` bytes."""
    for piece in target.parent.glob(f"{target.name}.[0-9][0-9]"):
        piece.unlink()  # of an earlier call, which may have had more of them
    with tarfile.open(target, "w:xz", preset=1) as tar:
        tar.add(folder, arcname=folder.name)
    if target.stat().st_size <= largest:
        return
    with target.open("rb") as file:
        for number in itertools.count():
            if not (block := file.read(largest)):
                break
            target.with_name(f"{target.name}.{number:02}").write_bytes(block)
    target.unlink()


def read_manifest() -> dict[str, Any]:
    """What the kit consists of."""
    try:
        manifest = json.loads((HERE / "manifest.json").read_text())
        for part in manifest["parts"]:
            if Path(part["name"]).name != part["name"] or not {"size", "sha256"} <= set(part):
                raise ValueError(f"a part is {part}")  # noqa: TRY301
        for name in ("minutes", "limit", "max_result"):
            float(manifest[name])
    except (OSError, ValueError, LookupError, TypeError) as error:
        sys.exit(f"invalid manifest.json, copy it again: {type(error).__name__}: {error}")
    return dict(manifest)


def read_limit(manifest: dict[str, Any]) -> float:
    """Seconds that a call may take."""
    text = os.environ.get("FORGE_KIT_LIMIT", str(manifest["limit"]))
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not PACKING_S < limit < math.inf:
        sys.exit(f"invalid FORGE_KIT_LIMIT {text!r}: expected seconds, more than {PACKING_S}")
    return limit


def require_python(manifest: dict[str, Any]) -> None:
    """End on another Python than the wheels are for."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if (wanted := manifest.get("python", here)) != here:
        sys.exit(
            f"this kit is for Python {wanted}, python3 is {here}: make it with --python {here}"
        )


def main(arguments: list[str]) -> int:
    """Run one command."""
    start, manifest = time.monotonic(), read_manifest()
    limit = read_limit(manifest)
    taking = arguments == ["take"]
    if not taking and (arguments[:1] != ["go"] or len(arguments) == 1):
        sys.exit(__doc__)
    if not taking:
        require_python(manifest)
    try:
        WORK.mkdir(parents=True, exist_ok=True)
        with (WORK / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sys.exit(f"another call works in {WORK}: wait for it, or set FORGE_KIT_WORK")
            take(manifest)
            if taking:
                return 0
            return go(manifest, Path(arguments[1]).resolve(), arguments[2:], start, limit)
    except OSError as error:  # a full disk, a folder that cannot be written
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
