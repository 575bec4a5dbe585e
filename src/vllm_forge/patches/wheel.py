"""The patched wheel: the published one, with the series' files, and a version that says so.

Members that do not change are copied as they are, compressed bytes and all; nothing depends
on a compressor but the few changed files, which are stored.
"""

import copy
import hashlib
import io
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_forge.host import atomic_path
from vllm_forge.host.errors import CacheError
from vllm_forge.patches.apply import Applied
from vllm_forge.patches.errors import WheelSourceError
from vllm_forge.sources import SourceRepo
from vllm_forge.sources.wheel_format import record_row, rewrite_record, seek_to_data

STAMP = (2025, 1, 1, 0, 0, 0)
TREE_CHARS = 12
# Written at release time from the tag: the wheel's differs from the sdist's by its commit id.
GENERATED = "vllm/_version.py"


@dataclass(frozen=True, kw_only=True)
class ChangedFile:
    """A file of the wheel that the series changes: path in the wheel and git blob hashes."""

    path: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class PatchedWheel:
    """A line's patched wheel; ``version`` is ``<release>+forge.<first 12 of the tree hash>``."""

    path: Path
    version: str
    tree: str
    changed: tuple[ChangedFile, ...]


def local_version(release: str, tree: str) -> str:
    """PEP 440 version of a patched release."""
    return f"{release}+forge.{tree[:TREE_CHARS]}"


def blob_hash(content: bytes) -> str:
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def read_blob(repo: SourceRepo, digest: str) -> bytes:
    """The content of a blob; git checks its compression, but not its hash."""
    content = repo.git("cat-file", "blob", digest).stdout
    if blob_hash(content) != digest:
        raise CacheError(
            f"blob {digest} has other content", where=str(repo.path), remedy="delete the repository"
        )
    return content


def python_blobs(repo: SourceRepo, tree: str) -> dict[str, str]:
    """Path -> git blob hash of the Python files below ``vllm/`` in a tree."""
    listing = repo.git("ls-tree", "-r", "-z", tree, "--", "vllm/").stdout.decode()
    rows = (row.split("\t") for row in listing.split("\0")[:-1])
    return {path: meta.split()[2] for meta, path in rows if path.endswith(".py")}


def changed_files(repo: SourceRepo, applied: Applied) -> tuple[ChangedFile, ...]:
    """What a series changes; WheelSourceError if that is more than the content of vllm/**/*.py."""
    trees = (applied.base, applied.result)
    rows = repo.git("diff-tree", "-r", "-z", "--no-renames", *trees).stdout.decode()
    parts = rows.split("\0")[:-1]
    files = []
    for meta, path in zip(parts[::2], parts[1::2], strict=True):
        old_mode, new_mode, before, after, status = meta.removeprefix(":").split()
        module = path.startswith("vllm/") and path.endswith(".py") and path != GENERATED
        if status != "M" or old_mode != new_mode or not module:
            raise WheelSourceError(
                f"the series does more than change Python files of the package: {status} {path}",
                where=path,
                remedy="a file outside the wheel needs a build from source, which this line has "
                "not; keep such a change as a disposition",
            )
        files.append(ChangedFile(path=path, before=before, after=after))
    return tuple(files)


def build_wheel(
    repo: SourceRepo, applied: Applied, published: Path, release: str, folder: Path
) -> PatchedWheel:
    """Write the patched wheel into ``folder``. Same inputs, same bytes.

    ``published`` is the wheel as downloaded, whose hash was checked.

    Raises:
        WheelSourceError: a Python file of the wheel is not the one in the source archive, or
            the wheel lacks a file that has to change.
    """
    version = local_version(release, applied.result)
    changed = changed_files(repo, applied)
    name = published.name.replace(f"-{release}-", f"-{version}-", 1)
    target = folder / name
    with zipfile.ZipFile(published) as source, published.open("rb") as raw:
        if twice := [path for path, n in Counter(source.namelist()).items() if n > 1]:
            raise WheelSourceError(
                f"duplicate members: {', '.join(twice[:3])}",
                where=str(published),
                remedy="lock another release of vLLM",
            )
        _require_source(repo, applied.base, source, published)
        old_info, new_info = f"vllm-{release}.dist-info", f"vllm-{version}.dist-info"
        record = f"{old_info}/RECORD"
        carriers = {GENERATED, f"{old_info}/METADATA", record}
        if lost := sorted(carriers - set(source.namelist())):
            raise WheelSourceError(
                f"the wheel has no {', '.join(lost)}, where its version is",
                where=str(published),
                remedy="unsupported wheel layout; support it in patches/wheel.py",
            )
        if absent := sorted({file.path for file in changed} - set(source.namelist())):
            raise WheelSourceError(
                f"the series changes files that the wheel does not ship: {', '.join(absent)}",
                where=str(published),
                remedy="such a change has no effect on what is installed: drop it from the patch",
            )
        replaced = {file.path: read_blob(repo, file.after) for file in changed}
        replaced[GENERATED] = stamp_version(source.read(GENERATED), release, version, published)
        replaced[f"{old_info}/METADATA"] = replace_once(
            source.read(f"{old_info}/METADATA"),
            f"\nVersion: {release}\n",
            f"\nVersion: {version}\n",
            published,
        )
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
    for member in wheel.infolist():
        path = member.filename
        if path == GENERATED or path not in blobs:
            continue
        if blob_hash(wheel.read(member)) != blobs[path]:
            raise WheelSourceError(
                f"{path} in the wheel is not the file of the source archive",
                where=str(published),
                remedy="the patches are proven against the source; do not build from this wheel "
                "before you know why they differ",
            )


def replace_once(content: bytes, old: str, new: str, where: Path) -> bytes:
    """Replace text that must occur exactly once, else WheelSourceError."""
    if (count := content.count(old.encode())) != 1:
        raise WheelSourceError(f"{old.strip()!r} occurs {count} times, not once", where=str(where))
    return content.replace(old.encode(), new.encode())


def stamp_version(content: bytes, release: str, version: str, where: Path) -> bytes:
    """vllm/_version.py with our version: the string, and its local part in the tuple."""
    content = replace_once(content, f"version = '{release}'\n", f"version = '{version}'\n", where)
    numbers = ", ".join(release.split("."))
    local = version.partition("+")[2]
    return replace_once(
        content,
        f"version_tuple = ({numbers})\n",
        f"version_tuple = ({numbers}, '{local}')\n",
        where,
    )


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
