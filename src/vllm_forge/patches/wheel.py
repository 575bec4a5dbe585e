"""The patched vLLM: the published one, with the series' files, and a version that says so.

As a wheel: members that do not change are copied as they are, compressed bytes and all; nothing
depends on a compressor but the few changed files, which are stored.

In an environment that has the published wheel: all files or none, and back again. A file is either
as published or as patched, by its git blob hash. So there is no journal: after a kill -9 in the
middle the next run sees a mixture, says so, and ``--revert`` makes it whole. Files are written
aside and renamed, which also leaves a package cache that they were hard-linked from as it is.
"""

import copy
import hashlib
import io
import os
import subprocess
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vllm_forge.host import atomic_path, hash_of, write_whole
from vllm_forge.host.errors import CacheError
from vllm_forge.host.files import file_digest, read_sealed, write_sealed
from vllm_forge.matrix import FrozenModel
from vllm_forge.patches import errors
from vllm_forge.patches.apply import Applied, Patch, apply_series, tree_index
from vllm_forge.sources import SourceRepo, wheel_format
from vllm_forge.sources.wheel_format import record_row, rewrite_record, seek_to_data

STAMP = (2025, 1, 1, 0, 0, 0)
TREE_CHARS = 12
# Written at release time from the tag: the wheel's differs from the sdist's by its commit id.
GENERATED = "vllm/_version.py"
# The series of another distribution is for its source, where the package is below src/.
PREFIX = "src/"
# Asked of the target's Python, which need not be able to import vLLM.
PROBE = """
import importlib.metadata as m, json, pathlib, sys
result = {"python_version": "%d.%d" % sys.version_info[:2], "site": None}
try:
    d = m.distribution("vllm")
    result.update(site=str(pathlib.Path(d.locate_file("")).resolve()),
                  info=pathlib.Path(d._path).name,
                  version=d.version,
                  editable='"editable"' in (d.read_text("direct_url.json") or ""))
except m.PackageNotFoundError:
    pass
print(json.dumps(result))
"""


@dataclass(frozen=True, kw_only=True)
class ChangedFile:
    """A file of the wheel that the series changes: path in the wheel and git blob hashes."""

    path: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class PatchedWheel:
    """A line's patched wheel; ``tree`` is git's hash of the patched source."""

    path: Path
    version: str
    tree: str
    changed: tuple[ChangedFile, ...]


def local_version(release: str, tree: str) -> str:
    """PEP 440 version of a patched release: its tree hash's first characters are the local part."""
    return f"{release}+forge.{tree[:TREE_CHARS]}"


def blob_hash(content: bytes) -> str:
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def read_blob(repo: SourceRepo, digest: str) -> bytes:
    """The content of a blob; git checks its compression, but not its hash."""
    content = repo.git("cat-file", "blob", digest).stdout
    if blob_hash(content) != digest:
        what = f"blob {digest} has other content"
        raise CacheError(what, where=repo.path, remedy="delete the repository")
    return content


def python_blobs(repo: SourceRepo, tree: str) -> dict[str, str]:
    """Path -> git blob hash of the Python files below ``vllm/`` in a tree."""
    listing = repo.git("ls-tree", "-r", "-z", tree, "--", "vllm/").stdout.decode()
    rows = (row.split("\t") for row in listing.split("\0")[:-1])
    return {path: meta.split()[2] for meta, path in rows if path.endswith(".py")}


def changed_files(repo: SourceRepo, applied: Applied) -> tuple[ChangedFile, ...]:
    """What a series changes; WheelSourceError if that is more than the content of vllm/**/*.py."""
    trees = (applied.base, applied.result)
    rows = repo.git("diff-tree", "-r", "-z", "--no-renames", *trees).stdout.decode().split("\0")
    files = []
    for meta, path in zip(rows[:-1:2], rows[1::2], strict=True):
        old_mode, new_mode, before, after, status = meta.removeprefix(":").split()
        module = path.startswith("vllm/") and path.endswith(".py") and path != GENERATED
        if status != "M" or old_mode != new_mode or not module:
            mode = f" (mode {old_mode}, then {new_mode})" if status in "MT" else ""
            what = "the series does more than change Python files of the package: "
            what += f"{status} {path}{mode}"
            remedy = "change only lines of files that vllm/ has: no image builds vLLM from source; "
            remedy += "record another change in dispositions.toml"
            raise errors.WheelSourceError(what, where=path, remedy=remedy)
        files.append(ChangedFile(path=path, before=before, after=after))
    return tuple(files)


def kept_wheel(
    repo: SourceRepo, applied: Applied, published: Path, release: str, folder: Path
) -> PatchedWheel:
    """``build_wheel``, or what it wrote to ``folder`` before, by the same code, if that is whole.

    ``folder`` is of the published wheel's hash and the patched tree.
    """
    version = local_version(release, applied.result)
    path = folder / _patched_name(published, release, version)
    seal = folder / "written.json"
    program = hash_of([Path(file).read_text() for file in (__file__, wheel_format.__file__)])
    with suppress(OSError, ValueError):
        if read_sealed(seal) == {"program": program, "sha256": file_digest(path)}:
            changed = changed_files(repo, applied)
            return PatchedWheel(path=path, version=version, tree=applied.result, changed=changed)
    wheel = build_wheel(repo, applied, published, release, folder)
    write_sealed(seal, {"program": program, "sha256": file_digest(path)})
    return wheel


def _patched_name(published: Path, release: str, version: str) -> str:
    return published.name.replace(f"-{release}-", f"-{version}-", 1)


def build_wheel(
    repo: SourceRepo, applied: Applied, published: Path, release: str, folder: Path
) -> PatchedWheel:
    """Write the patched wheel of ``published``, already verified. Same inputs, same bytes."""
    version = local_version(release, applied.result)
    changed = changed_files(repo, applied)
    target = folder / _patched_name(published, release, version)
    with zipfile.ZipFile(published) as source, published.open("rb") as raw:
        if twice := [path for path, n in Counter(source.namelist()).items() if n > 1]:
            what = f"duplicate members: {', '.join(twice[:3])}"
            remedy = "lock another release of vLLM"
            raise errors.WheelSourceError(what, where=published, remedy=remedy)
        _require_source(repo, applied.base, source, published)
        old_info, new_info = f"vllm-{release}.dist-info", f"vllm-{version}.dist-info"
        record = f"{old_info}/RECORD"
        members = set(source.namelist())
        if lost := sorted({GENERATED, f"{old_info}/METADATA", record} - members):
            what = f"the wheel has no {', '.join(lost)}, where its version is"
            remedy = "unsupported wheel layout; support it in patches/wheel.py"
            raise errors.WheelSourceError(what, where=published, remedy=remedy)
        if absent := sorted({file.path for file in changed} - members):
            what = f"the series changes files that the wheel does not ship: {', '.join(absent)}"
            remedy = "such a change has no effect on what is installed: drop it from the patch"
            raise errors.WheelSourceError(what, where=published, remedy=remedy)
        replaced = {file.path: read_blob(repo, file.after) for file in changed}
        replaced[GENERATED] = stamp_version(source.read(GENERATED), release, version, published)
        metadata = f"{old_info}/METADATA"
        old, new = (f"\nVersion: {number}\n" for number in (release, version))
        replaced[metadata] = replace_once(source.read(metadata), old, new, published)
        replaced[record] = rename_record(source.read(record), replaced, old_info, new_info)
        with atomic_path(target) as aside, zipfile.ZipFile(aside, "w") as out:
            for member in source.infolist():
                path = member.filename.replace(old_info, new_info, 1)
                if member.filename in replaced:
                    info = zipfile.ZipInfo(path, STAMP)
                    info.external_attr = member.external_attr
                    info.compress_type = zipfile.ZIP_STORED
                    out.writestr(info, replaced[member.filename])
                else:
                    _copy(raw, member, path, out)
    return PatchedWheel(path=target, version=version, tree=applied.result, changed=changed)


def _require_source(repo: SourceRepo, base: str, wheel: zipfile.ZipFile, published: Path) -> None:
    blobs = python_blobs(repo, base)
    for path in wheel.namelist():
        if path != GENERATED and path in blobs and blob_hash(wheel.read(path)) != blobs[path]:
            what = f"{path} in the wheel is not the file of the source archive"
            remedy = "the patches are proven against the source; do not build from this wheel "
            remedy += "before you know why they differ"
            raise errors.WheelSourceError(what, where=published, remedy=remedy)


def replace_once(content: bytes, old: str, new: str, where: Path) -> bytes:
    """Replace text that must occur exactly once, else WheelSourceError."""
    if (count := content.count(old.encode())) != 1:
        what = f"{old.strip()!r} occurs {count} times, not once"
        raise errors.WheelSourceError(what, where=where)
    return content.replace(old.encode(), new.encode())


def stamp_version(content: bytes, old: str, new: str, where: Path) -> bytes:
    """vllm/_version.py with another version: the string, and the tuple with its local part."""

    def numbers(version: str) -> str:
        release, _, local = version.partition("+")
        return ", ".join([*release.split("."), *([f"'{local}'"] if local else [])])

    content = replace_once(content, f"version = '{old}'\n", f"version = '{new}'\n", where)
    old, new = (f"version_tuple = ({numbers(version)})\n" for version in (old, new))
    return replace_once(content, old, new, where)


def rename_record(old: bytes, replaced: Mapping[str, bytes], old_info: str, new_info: str) -> bytes:
    """RECORD with the rows of the replaced members, and of the renamed dist-info folder."""

    def change(path: str, digest: str, size: str) -> tuple[str, str, str]:
        columns = record_row(replaced[path]) if path in replaced else (digest, size)
        return path.replace(old_info, new_info, 1), *columns

    return rewrite_record(old, change)


def _copy(raw: io.BufferedReader, member: zipfile.ZipInfo, path: str, out: zipfile.ZipFile) -> None:
    """Append a member without inflating it; zipfile has no public call for this."""
    info = copy.copy(member)
    info.filename = path
    info.flag_bits &= ~0x08  # sizes are in the header, not behind the data
    info.extra = b""
    assert out.fp is not None  # noqa: S101 - it is open
    info.header_offset = out.fp.tell()
    out.fp.write(info.FileHeader())
    seek_to_data(raw, member)
    out.fp.write(raw.read(member.compress_size))
    out.filelist.append(info)
    out.NameToInfo[path] = info
    out.start_dir = out.fp.tell()
    out._didModify = True  # type: ignore[attr-defined]


class Installed(FrozenModel):
    """The vLLM of an environment; ``site`` is None where it is not installed."""

    python_version: str
    site: Path | None
    info: str = ""
    version: str = ""
    editable: bool = False


def find_python(given: Path | None) -> Path:
    """The interpreter to patch: ``given``, or the active environment's; else NoEnvironmentError."""
    active = os.environ.get("VIRTUAL_ENV")
    python = given or (Path(active) / "bin" / "python" if active else None)
    if python is None or not python.exists():
        what = "no virtual environment" if python is None else f"{python} does not exist"
        remedy = "activate one, or name its interpreter with --python"
        raise errors.NoEnvironmentError(what, remedy=remedy)
    if not (python.parent.parent / "pyvenv.cfg").exists():
        what = "not a virtual environment; a system's Python is not ours to change"
        raise errors.NoEnvironmentError(what, where=python, remedy="make one: python3 -m venv DIR")
    return python


def probe(python: Path) -> Installed:
    """What is installed there; DirtyTreeError if that is editable, from a source tree."""
    argv = (python, "-I", "-c", PROBE)
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    try:  # a .pth may print before it
        target = Installed.model_validate_json(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        what = f"the interpreter does not run: {done.stderr.strip()[-300:]}"
        remedy = "make the environment again: python3 -m venv DIR"
        raise errors.NoEnvironmentError(what, where=python, remedy=remedy) from None
    if target.editable:
        what = "vLLM is installed from a source tree (editable)"
        remedy = "apply patches/vllm/<line>/*.patch to that tree with git am or git apply"
        raise errors.DirtyTreeError(what, where=target.site, remedy=remedy)
    return target


class Installer:
    """Patches one installed vLLM with one series."""

    def __init__(self, target: Installed, repo: SourceRepo, applied: Applied, release: str) -> None:
        assert target.site is not None  # noqa: S101 - the caller installed one
        self.target = target
        self.site: Path = target.site
        self.release = release
        self.version = local_version(release, applied.result)
        self._repo = repo
        self._base = applied.base
        self._changed = changed_files(repo, applied)

    def patch(self) -> None:
        """Apply the series; a mixture, e.g. after a kill, is a InstalledStateError."""
        published, patched = self._state()
        if patched and not published:
            what = f"this vLLM is {self.version} already"
            raise errors.InstalledStateError(what, where=self.site)
        if patched:
            what = f"{len(patched)} files are patched, {len(published)} are not"
            remedy = "run this with --revert first: it restores all published files"
            raise errors.InstalledStateError(what, where=self.site, remedy=remedy)
        self._replace({file.path: file.after for file in self._changed}, self.release, self.version)

    def revert(self) -> None:
        """Put every file back as published, also from a mixture; else InstalledStateError."""
        _, patched = self._state()
        if not patched:
            what = f"this vLLM is {self.target.version}, as published"
            raise errors.InstalledStateError(what, where=self.site)
        originals = {file.path: file.before for file in self._changed}
        self._replace(originals, self.version, self.release)

    def _state(self) -> tuple[list[str], list[str]]:
        """Files of the series, and metadata, that are as published and as patched."""
        if self.target.version not in {self.release, self.version}:
            what = f"vLLM {self.target.version} is installed, this series is for {self.release}"
            remedy = f"install vllm=={self.release}, or choose another --line"
            raise errors.InstalledStateError(what, where=self.site, remedy=remedy)
        published: list[str] = []
        patched: list[str] = []
        foreign: list[str] = []
        changed = {file.path: file.after for file in self._changed}
        for path, base in python_blobs(self._repo, self._base).items():
            file = self.site / path
            if path == GENERATED or not (file.exists() or path in changed):
                continue  # the wheel ships only a part of the source tree
            actual = blob_hash(file.read_bytes()) if file.exists() else ""
            states = {base: published, changed[path]: patched} if path in changed else {base: []}
            states.get(actual, foreign).append(path)
        info = self.target.info
        versioned = [GENERATED, f"{info}/METADATA"]
        contents = {path: (self.site / path).read_bytes() for path in versioned}
        for path, content in (contents | {info: info.encode()}).items():  # the folder's name, too
            (patched if self.version.encode() in content else published).append(path)
        if foreign:
            shown = ", ".join(foreign[:5]) + (" ..." if len(foreign) > 5 else "")  # noqa: PLR2004
            what = f"{len(foreign)} files are neither as published nor as patched: {shown}"
            remedy = f"reinstall vllm=={self.release}, then run this again"
            raise errors.DirtyTreeError(what, where=self.site, remedy=remedy)
        return published, patched

    def _replace(self, blobs: dict[str, str], old: str, new: str) -> None:
        """Prepare every new file, then rename them into place; metadata comes last."""
        old_info, new_info = f"vllm-{old}.dist-info", f"vllm-{new}.dist-info"
        folder = self.site / self.target.info
        contents = {path: read_blob(self._repo, blob) for path, blob in blobs.items()}
        module, metadata = self.site / GENERATED, folder / "METADATA"
        contents[GENERATED] = stamp = module.read_bytes()
        if f"version = '{new}'\n".encode() not in stamp:
            contents[GENERATED] = stamp_version(stamp, old, new, module)
        text = metadata.read_bytes()
        if f"\nVersion: {old}\n".encode() in text:
            text = replace_once(text, f"\nVersion: {old}\n", f"\nVersion: {new}\n", metadata)
        record = rename_record(
            (folder / "RECORD").read_bytes(),
            contents | {f"{old_info}/METADATA": text, f"{new_info}/METADATA": text},
            old_info,
            new_info,
        )
        _replace_all(
            {self.site / path: content for path, content in contents.items()}
            | {metadata: text, folder / "RECORD": record}
        )
        if folder.name != new_info:
            folder.rename(self.site / new_info)


def _replace_all(contents: dict[Path, bytes]) -> None:
    """Write all files aside; only when all are there, rename them into place."""
    aside = {path: path.with_name(f".vllm-forge-{path.name}") for path in contents}
    try:
        for path, content in contents.items():
            aside[path].write_bytes(content)
            aside[path].chmod(path.stat().st_mode & 0o777)
    except OSError:
        for new in aside.values():
            new.unlink(missing_ok=True)
        raise
    for path, new in aside.items():
        new.rename(path)


def patch_installed(site: Path, patches: Sequence[Patch]) -> list[Path]:
    """Apply patches to the files below ``site``, if all apply; return those that changed."""
    with tempfile.TemporaryDirectory(prefix="vllm-forge-installed-") as folder:
        repo = SourceRepo(Path(folder) / "tree.git")
        repo.git("init", "--quiet", "--bare")
        with tree_index(repo) as index:
            for path in sorted({path for patch in patches for path in patch.files}):
                installed = site / path.removeprefix(PREFIX)
                if not (path.startswith(PREFIX) and installed.is_file()):
                    what = f"the series changes {path}, which is not installed"
                    remedy = "the patch is for another release: see the series' folder"
                    raise errors.WrongBaseError(what, where=site, remedy=remedy)
                index.put(path, "100644", installed.read_bytes())
            base = index.tree()
        result = apply_series(repo, base, patches).result
        listing = repo.git("diff-tree", "-r", "-z", "--name-only", base, result).stdout.decode()
        changed = {
            path.removeprefix(PREFIX): repo.git("cat-file", "blob", f"{result}:{path}").stdout
            for path in filter(None, listing.split("\0"))
        }
    for path, content in changed.items():
        write_whole(site / path, content)
    return [site / path for path in changed]
