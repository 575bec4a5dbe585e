"""What an image's layers must and must not have, judged from outside: nothing in it runs.

No program of the image can forge these verdicts. System layers are read from their blobs, wheel
layers, which vllm-forge wrote, from their unpacked copies.
"""

from __future__ import annotations

import csv
import hashlib
import posixpath
import re
import stat
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.errors import shortened
from vllm_forge.host import hash_of
from vllm_forge.host.files import read_plain, walk_plain
from vllm_forge.images import layer
from vllm_forge.images.bytecode import bytecode_problems
from vllm_forge.images.content import STACK, VLLM, stack_entry
from vllm_forge.images.layer import overlay
from vllm_forge.images.layout import ImageLayer
from vllm_forge.images.record import recall
from vllm_forge.images.wheels import VENV, Entry, site_packages, wheel_entries
from vllm_forge.matrix.model import WheelFile
from vllm_forge.patches.wheel import GENERATED, blob_hash
from vllm_forge.sources import Wheelhouse

if TYPE_CHECKING:
    from vllm_forge.images.build import Candidate
    from vllm_forge.images.plan import ImagePlan

OWN = "opt/vllm-forge/"
PROGRAMS = ("usr/bin", "usr/sbin", "bin", "sbin", "usr/local/bin", "usr/local/sbin")
CUDA_PROGRAMS = "nvidia/cu13/bin"  # below site-packages
# An engine's hook brings these of the host's driver.
DRIVER_PROGRAMS = ("nvidia-", "nv-")
BYTECODE = (".pyc", ".pyo")
# What changes how every Python of the environment starts.
START_FILES = (".pth", ".egg-link", "._pth", ".start")
START_MODULES = frozenset({"sitecustomize", "usercustomize"})
# Of libarchive and GNU tar; tar knows no other way to carry extended attributes.
XATTRS = ("SCHILY.xattr.", "LIBARCHIVE.xattr.")
FORBIDDEN_NAMES = frozenset({".git", ".netrc", ".pypirc", ".docker", ".ssh", "id_rsa", ".aws"})
# Must be empty: the volume, installers' caches, secrets of the build.
EMPTY = ("cache/", "root/.cache/", "var/cache/pip/", "run/secrets/")
# Outside of site-packages, where every file is a locked wheel's.
WEIGHTS = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth")
KEY_FILES = (".pem", ".key")
PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")
SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class SystemFile:
    """An entry of a system layer; ``private_key``: its content has one."""

    layer: str
    info: tarfile.TarInfo
    private_key: bool = False


def system_files(layers: Sequence[ImageLayer]) -> dict[str, SystemFile]:
    """Path -> entry of the image that these layers, lowest first, make; whiteouts are applied.

    Read once for the same blobs, whose digests the caller has compared.
    """
    blobs = [row.blob for row in layers]

    def read(path: str, info: tarfile.TarInfo, tar: tarfile.TarFile) -> list[Any]:
        key = info.isreg() and path.endswith(KEY_FILES)
        content = tar.extractfile(info) if key else None
        private = content is not None and bool(PRIVATE_KEY.search(content.read()))
        return [info.mode, info.type.decode("latin-1"), info.pax_headers, private]

    files, inputs = {}, [_program(), *(blob.digest for blob in blobs)]
    for path, (number, row) in recall(inputs, lambda: overlay(blobs, read)).items():
        mode, kind, headers, private = row
        info = tarfile.TarInfo(path)
        info.mode, info.type, info.pax_headers = mode, kind.encode("latin-1"), headers
        if path != ".":
            files[path] = SystemFile(layer=layers[number].name, info=info, private_key=private)
    return files


def _program() -> str:
    """Hash of the code that reads layers: another one reads them again."""
    return hash_of([Path(file).read_text() for file in (__file__, layer.__file__)])


def system_problems(files: Mapping[str, SystemFile]) -> list[str]:
    """What no system layer may have: rights, private attributes, devices, bytecode."""
    problems = []
    for path, file in files.items():
        info = file.info
        if not info.isdir() and info.mode & (stat.S_ISUID | stat.S_ISGID):
            problems.append(f"setuid or setgid program: /{path}")
        if info.isdev():
            problems.append(f"device or FIFO: /{path}")
        if not info.issym() and info.mode & stat.S_IWOTH and not info.mode & stat.S_ISVTX:
            problems.append(f"writable by every user: /{path}")
        for key in info.pax_headers:
            if key.startswith(XATTRS):
                problems.append(f"extended attribute {key.split('.', 2)[2]}: /{path}")
        if is_bytecode(path):
            problems.append(f"bytecode: /{path}")
    return problems


def is_bytecode(path: str) -> bool:
    """Whether Python made that file or folder of a source: it differs from build to build."""
    return path.endswith(BYTECODE) or path.rpartition("/")[2] == "__pycache__"


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """An image's files by origin: ``system`` made by others, ``folders`` unpacked, lowest first.

    ``python`` is the version of the environment, e.g. ``3.13``.
    """

    system: Mapping[str, SystemFile]
    folders: Sequence[Path]
    python: str

    @cached_property
    def site(self) -> str:
        return site_packages(self.python)

    @cached_property
    def written(self) -> dict[str, Path]:
        """Path of a file or link -> folder of the highest layer that has it."""
        return {path: folder for folder in self.folders for path in walk_plain(folder)}

    def read(self, path: str) -> bytes:
        """Content of a written file."""
        return read_plain(self.written[path] / path)

    @cached_property
    def owners(self) -> dict[str, list[str]]:
        """Path -> the wheels that brought it, by the RECORDs of the image."""
        owners: dict[str, list[str]] = {}
        for path in self.written:
            if path.endswith(".dist-info/RECORD") and path.count("/") == self.site.count("/") + 2:
                owner = distribution(path.split("/")[-2])
                rows = self.read(path).decode().splitlines()
                recorded = {self._target(row[0]) for row in csv.reader(rows) if row}
                for target in recorded | {path}:
                    owners.setdefault(target, []).append(owner)
        return owners

    def _target(self, path: str) -> str:
        return (
            posixpath.normpath(f"{self.site}/{path}") if path[:1] == "." else f"{self.site}/{path}"
        )

    def inside(self, path: str) -> str:
        """The path below site-packages; empty for one that is elsewhere."""
        site, slash, below = path.partition(f"{self.site}/")
        return below if slash and not site else ""


def distribution(info: str) -> str:
    """Normalized name of a ``NAME-VERSION.dist-info`` folder."""
    return re.sub(r"[-_.]+", "-", info.removesuffix(".dist-info").rpartition("-")[0]).lower()


def packages(files: ImageFiles, expected: Mapping[str, str]) -> str:
    """The installed distributions are exactly those of the lock."""
    installed = set()
    for path in files.written:
        folder, _, rest = files.inside(path).partition("/")
        if folder.endswith(".egg-info"):
            installed.add((folder, "egg-info"))
        if folder.endswith(".dist-info") and rest == "METADATA":
            head = files.read(path).decode().partition("\n\n")[0]
            fields = dict(re.findall(r"^(Name|Version): *(.*?)\r?$", head, re.MULTILINE))
            name = re.sub(r"[-_.]+", "-", fields.get("Name", folder)).lower()
            installed.add((name, fields.get("Version", "")))
    if wrong := sorted(installed ^ set(expected.items())):
        raise AssertionError(f"installed and locked packages differ: {wrong[:SHOWN]}")
    return f"{len(installed)} distributions"


def tree(files: ImageFiles, blobs: Mapping[str, str], changed: Mapping[str, str]) -> str:
    """Every Python file of vLLM is the one in the patched source tree.

    ``blobs``: path -> git blob hash of the tree's; ``changed``: paths of the patched ones.
    """
    seen = 0
    for path, blob in blobs.items():
        if path == GENERATED:  # carries our version
            continue
        file = f"{files.site}/{path}"
        if file not in files.written:
            if path in changed:
                raise AssertionError(f"a patched file is not installed: {path}")
            continue  # a file of the source tree that the wheel does not ship
        if blob_hash(files.read(file)) != blob:
            raise AssertionError(f"{path} differs from the patched tree")
        seen += 1
    if missing := sorted(set(changed) - set(blobs)):
        raise AssertionError(f"patched files outside the checked tree: {missing}")
    return f"{seen} files, {len(changed)} of them patched"


def stack(files: ImageFiles, record: dict[str, Any]) -> str:
    """stack.json is the record of this build."""
    if STACK not in files.written or files.read(STACK) != stack_entry(record).content:
        raise AssertionError(f"/{STACK} is not the record of this build")
    return str(record["tree"])


def hygiene(files: ImageFiles) -> str:
    """No repositories, credentials, caches of installers, or weights."""
    keys = [path for path, file in files.system.items() if file.private_key]
    for path in files.written:
        if path.endswith(KEY_FILES) and PRIVATE_KEY.search(files.read(path)):
            keys.append(path)
    bad = [f"private key: /{path}" for path in keys]
    plain = [path for path, file in files.system.items() if not file.info.isdir()]
    every = {*files.system, *files.written}
    for path in every:
        if not FORBIDDEN_NAMES.isdisjoint(path.split("/")):
            bad.append(f"forbidden name: /{path}")
        if path.endswith(WEIGHTS) and "/site-packages/" not in path:
            bad.append(f"weights: /{path}")
    bad += [f"not empty: /{path}" for path in (*plain, *files.written) if path.startswith(EMPTY)]
    _refuse(bad)
    return f"{len(every)} files"


def system(files: ImageFiles) -> str:
    """No setuid programs, private attributes, devices, or bytecode."""
    _refuse(system_problems(files.system))
    return f"{len(files.system)} entries"


def wheel_files(
    files: ImageFiles,
    blobs: Mapping[str, str],
    rows: Sequence[WheelFile],
    wheel_path: Callable[[str], Path | None],
) -> str:
    """Each file of the wheels has one owner, lies where it may, and hides none of another's.

    ``rows``: exceptions of this line, of which one that nothing needs is refused; ``wheel_path``:
    locked distribution -> its wheel.
    """
    problems, used = [], set()
    judge = _WheelJudge(files=files, blobs=blobs, wheel_path=wheel_path)
    wheels = [(row, set(row.wheels)) for row in rows]
    for path in files.written:
        owners = files.owners.get(path, [])
        brought, below = set(owners), files.inside(path)
        row = next((r for r, of in wheels if of == brought and fnmatchcase(below, r.path)), None)
        # Two wheels of a row need not be compared.
        why = "" if row is not None and len(owners) > 1 else judge.problem(path, owners)
        if row is not None and (why or len(owners) > 1):
            used.add(row.path)
        elif why:
            problems.append(f"{why}: /{path} of {' and '.join(owners) or 'no wheel'}")
    problems += [f"no file needs the row wheel_file {r.path}" for r in rows if r.path not in used]
    _refuse(problems)
    return f"{len(files.written)} files, {len(rows)} exceptions"


@dataclass(frozen=True, kw_only=True)
class _WheelJudge:
    """What is wrong with a path of the written layers; see ``wheel_files``."""

    files: ImageFiles
    blobs: Mapping[str, str]
    wheel_path: Callable[[str], Path | None]
    entries: dict[str, dict[str, Entry]] = field(default_factory=dict)  # of wheels that were read
    folders: dict[str, str] = field(default_factory=dict)  # what hides them

    @cached_property
    def programs(self) -> set[str]:
        """Names of the system's programs."""
        paths = map(posixpath.split, self.files.system)
        return {name for folder, name in paths if folder in PROGRAMS}

    def problem(self, path: str, owners: Sequence[str]) -> str:
        """Why a file may not be there; empty if it may."""
        return self._hides(path) or next(self._problems(path, owners), "")

    def _problems(self, path: str, owners: Sequence[str]) -> Iterator[str]:
        files, below = self.files, self.files.inside(path)
        top = below.partition("/")[0]
        if not owners and not (path.startswith(OWN) or (files.written[path] / path).is_symlink()):
            yield "file that no RECORD lists"
        if is_bytecode(path) or "/__pycache__/" in path:
            yield "bytecode"
        if self._hides_program(path):
            yield "program that hides another"
        if top.partition(".")[0] in START_MODULES or (top == below and top.endswith(START_FILES)):
            yield "file that runs when Python starts"
        if top.endswith(".dist-info") and owners != [distribution(top)]:
            yield "file in the metadata of another wheel"
        if top == VLLM:
            if owners != [VLLM]:
                yield "file in the package vllm"
            if below.endswith(".py") and below not in self.blobs and below != GENERATED:
                yield "module that the source tree lacks"
        if len(owners) > 1 and self._differ(path, owners):
            yield "file with different content"

    def _hides_program(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        cuda = f"{self.files.site}/{CUDA_PROGRAMS}"
        if folder not in {f"{VENV}/bin", cuda}:  # before the system's
            return False
        other = f"{cuda}/{name}"
        hidden = name in self.programs or name.startswith(DRIVER_PROGRAMS)
        return hidden or (other != path and other in self.files.written)

    def _hides(self, path: str) -> str:
        system = self.files.system
        if path in system:
            return f"file that hides one of {system[path].layer}"
        folder = path.rpartition("/")[0]
        if folder not in self.folders:
            why, parent = "", folder
            while parent and not why:
                entry = system.get(parent)
                if entry is not None and not entry.info.isdir():
                    why = f"file that replaces /{parent} of {entry.layer}"
                elif parent in self.files.written:
                    why = f"file below another file, /{parent}"
                parent = posixpath.dirname(parent)
            self.folders[folder] = why
        return self.folders[folder]

    def _differ(self, path: str, owners: Sequence[str]) -> bool:
        """Compare the wheels: a RECORD may have another hash than its file."""
        contents = set()
        for owner in owners:
            if owner not in self.entries:
                wheel = self.wheel_path(owner)
                rows = wheel_entries(wheel, self.files.python) if wheel is not None else []
                self.entries[owner] = {entry.path: entry for entry in rows}
            if (entry := self.entries[owner].get(path)) is None:
                return True
            contents.add(_digest(entry))
        return len(contents) > 1


def _digest(entry: Entry) -> bytes:
    if entry.content is not None:
        return hashlib.sha256(entry.content).digest()
    assert entry.archive is not None  # noqa: S101 - wheels have no links
    assert entry.member is not None  # noqa: S101
    with zipfile.ZipFile(entry.archive) as archive, archive.open(entry.member) as stream:
        return hashlib.file_digest(stream, "sha256").digest()  # type: ignore[arg-type]


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise AssertionError("\n  ".join(shortened(problems, SHOWN)))


def bytecode(folder: Path | None, files: ImageFiles, system: Sequence[ImageLayer]) -> str:
    """Each file of the layer of bytecode, unpacked in ``folder``, is of a source of the image."""
    if folder is None:
        return "none carried"
    paths = {path: folder / path for path in walk_plain(folder)}
    blobs = [row.blob for row in system]
    written = {path: place / path for path, place in files.written.items()}
    _refuse(bytecode_problems(paths, files.python, written, blobs))
    return f"{len(paths)} files"


def judge_layers(plan: ImagePlan, candidate: Candidate) -> dict[str, dict[str, Any]]:
    """All checks of a complete image: name -> verdict, as those inside print it."""
    record, blobs = candidate.stack, candidate.blobs
    files = ImageFiles(
        system=system_files(candidate.system.layers),
        folders=candidate.folders,
        python=plan.cell.line.python,
    )
    rows = [r for r in plan.project.matrix.wheel_file if plan.cell.line_name in r.lines]
    paths = {wheel.name: Wheelhouse().path(wheel) for wheel in plan.lock.wheels}
    checks: dict[str, Callable[[], str]] = {
        "packages": lambda: packages(files, record["packages"]),
        "tree": lambda: tree(files, blobs, record["changed_files"]),
        "stack": lambda: stack(files, record),
        "hygiene": lambda: hygiene(files),
        "system": lambda: system(files),
        "wheel-files": lambda: wheel_files(files, blobs, rows, paths.get),
        "bytecode": lambda: bytecode(candidate.bytecode, files, candidate.system.layers),
    }
    verdicts = {}
    for name, check in checks.items():
        start = time.monotonic()
        try:
            detail, passed = check(), True
        except (AssertionError, OSError, ValueError, tarfile.TarError) as error:
            detail, passed = str(error), False
        seconds = round(time.monotonic() - start, 2)
        verdicts[name] = {"passed": passed, "detail": detail, "seconds": seconds}
    return verdicts
