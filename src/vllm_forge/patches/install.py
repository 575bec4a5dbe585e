"""The series on a vLLM that is installed already: all files or none, and back again.

A file is either as published or as patched, by its git blob hash. So there is no
journal: after a kill -9 in the middle the next run sees a mixture, says so, and ``--revert``
makes it whole. Files are written aside and renamed, which also leaves a package cache that
they were hard-linked from as it is.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_forge.host import atomic_path
from vllm_forge.patches import errors, wheel
from vllm_forge.patches.apply import Applied, TreeIndex, apply_series
from vllm_forge.patches.header import Patch
from vllm_forge.sources import SourceRepo

# The series of another distribution is for its source, where the package is below src/.
PREFIX = "src/"
# Asked of the target's Python, which need not be able to import vLLM.
PROBE = """
import importlib.metadata as m, json, pathlib, sys
try:
    d = m.distribution("vllm")
except m.PackageNotFoundError:
    print(json.dumps({"python_version": "%d.%d" % sys.version_info[:2], "site": None}))
else:
    print(json.dumps({"python_version": "%d.%d" % sys.version_info[:2],
                      "site": str(pathlib.Path(d.locate_file("")).resolve()),
                      "info": pathlib.Path(d._path).name,
                      "version": d.version,
                      "editable": (d.read_text("direct_url.json") or "").find('"editable"') > 0}))
"""


@dataclass(frozen=True, kw_only=True)
class Installed:
    """The vLLM of an environment; ``site`` is None where it is not installed."""

    python_version: str
    site: Path | None
    info: str = ""
    version: str = ""


def find_python(given: Path | None) -> Path:
    """The interpreter whose packages to patch: ``given``, or the active one; NoEnvironmentError."""
    active = os.environ.get("VIRTUAL_ENV")
    python = given or (Path(active) / "bin" / "python" if active else None)
    if python is None or not python.exists():
        raise errors.NoEnvironmentError(
            "no virtual environment" if python is None else f"{python} does not exist",
            remedy="activate one, or name its interpreter with --python",
        )
    if not (python.parent.parent / "pyvenv.cfg").exists():
        raise errors.NoEnvironmentError(
            "not a virtual environment; a system's Python is not ours to change",
            where=str(python),
            remedy="make one: python3 -m venv DIR",
        )
    return python


def probe(python: Path) -> Installed:
    """What is installed there.

    Raises:
        NoEnvironmentError: the interpreter does not run.
        DirtyTreeError: vLLM is installed editable, from a source tree.
    """
    done = subprocess.run(
        [str(python), "-I", "-c", PROBE], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise errors.NoEnvironmentError(
            f"the interpreter does not run: {done.stderr.strip()[-300:]}", where=str(python)
        )
    found = json.loads(done.stdout)
    if found.pop("editable", False):
        raise errors.DirtyTreeError(
            "vLLM is installed from a source tree (editable)",
            where=found["site"],
            remedy="apply patches/vllm/<line>/*.patch to that tree with git am or git apply",
        )
    site = found.pop("site")
    return Installed(site=Path(site) if site else None, **found)


class Installer:
    """Patches one installed vLLM with one series."""

    def __init__(self, target: Installed, repo: SourceRepo, applied: Applied, release: str) -> None:
        assert target.site is not None  # noqa: S101 - the caller installed one
        self.target = target
        self.site: Path = target.site
        self.release = release
        self.version = wheel.local_version(release, applied.result)
        self._repo = repo
        self._base = applied.base
        self._changed = wheel.changed_files(repo, applied)

    def patch(self) -> None:
        """Apply the series.

        Raises:
            InstalledVersionError, DirtyTreeError: see _state.
            AlreadyPatchedError: this series is in place.
            PartlyPatchedError: a mixture, e.g. after a kill.
        """
        published, patched = self._state()
        if patched and not published:
            raise errors.AlreadyPatchedError(
                f"this vLLM is {self.version} already", where=str(self.site)
            )
        if patched:
            raise errors.PartlyPatchedError(
                f"{len(patched)} files are patched, {len(published)} are not",
                where=str(self.site),
                remedy="run this with --revert first: it restores all published files",
            )
        self._replace({file.path: file.after for file in self._changed}, self.release, self.version)

    def revert(self) -> None:
        """Put every file back as published, also from a mixture; else NotPatchedError."""
        _, patched = self._state()
        if not patched:
            raise errors.NotPatchedError(
                f"this vLLM is {self.target.version}, as published", where=str(self.site)
            )
        originals = {file.path: file.before for file in self._changed}
        self._replace(originals, self.version, self.release)

    def _state(self) -> tuple[list[str], list[str]]:
        """Files of the series, and metadata, that are as published and as patched.

        Raises:
            InstalledVersionError: neither this release nor this series' version.
            DirtyTreeError: a Python file that belongs to neither.
        """
        if self.target.version not in {self.release, self.version}:
            raise errors.InstalledVersionError(
                f"vLLM {self.target.version} is installed, this series is for {self.release}",
                where=str(self.site),
                remedy=f"install vllm=={self.release}, or choose another --line",
            )
        published, patched, foreign = [], [], []
        changed = {file.path: file for file in self._changed}
        for path, base in wheel.python_blobs(self._repo, self._base).items():
            file = self.site / path
            if path == wheel.GENERATED or not (file.exists() or path in changed):
                continue  # the wheel ships only a part of the source tree
            actual = wheel.blob_hash(file.read_bytes()) if file.exists() else ""
            if path in changed and actual == changed[path].before:
                published.append(path)
            elif path in changed and actual == changed[path].after:
                patched.append(path)
            elif path in changed or actual != base:
                foreign.append(path)
        info = self.target.info
        versioned = [wheel.GENERATED, f"{info}/METADATA"]
        contents = {path: (self.site / path).read_bytes() for path in versioned}
        for path, content in (contents | {info: info.encode()}).items():  # the folder's name, too
            (patched if self.version.encode() in content else published).append(path)
        if foreign:
            shown = ", ".join(foreign[:5]) + (" ..." if len(foreign) > 5 else "")  # noqa: PLR2004
            raise errors.DirtyTreeError(
                f"{len(foreign)} files are neither as published nor as patched: {shown}",
                where=str(self.site),
                remedy=f"reinstall vllm=={self.release}, then run this again",
            )
        return published, patched

    def _replace(self, blobs: dict[str, str], old: str, new: str) -> None:
        """Prepare every new file, then rename them into place; metadata comes last."""
        old_info, new_info = f"vllm-{old}.dist-info", f"vllm-{new}.dist-info"
        folder = self.site / self.target.info
        contents = {path: wheel.read_blob(self._repo, blob) for path, blob in blobs.items()}
        module = self.site / wheel.GENERATED
        contents[wheel.GENERATED] = self._restamp(module.read_bytes(), old, new)
        metadata = folder / "METADATA"
        text = metadata.read_bytes()
        if f"\nVersion: {old}\n".encode() in text:
            text = wheel.replace_once(text, f"\nVersion: {old}\n", f"\nVersion: {new}\n", metadata)
        record = wheel.rename_record(
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

    def _restamp(self, content: bytes, old: str, new: str) -> bytes:
        if f"version = '{new}'\n".encode() in content:
            return content
        if new == self.release:
            local = old.partition("+")[2]
            content = wheel.replace_once(
                content, f"version = '{old}'\n", f"version = '{new}'\n", self.site / wheel.GENERATED
            )
            return wheel.replace_once(
                content, f", '{local}')\n", ")\n", self.site / wheel.GENERATED
            )
        return wheel.stamp_version(content, old, new, self.site / wheel.GENERATED)


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
    """Apply patches to the files below ``site``; return those that changed.

    All patches are tried on a tree of their own first; then the files are replaced one by one.

    Raises:
        WrongBaseError: a file that the series touches is not installed.
        WrongContextError, OffsetError, AlreadyUpstreamError, ...: see apply_series.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-forge-installed-") as folder:
        repo = SourceRepo(Path(folder) / "tree.git")
        repo.git("init", "--quiet", "--bare")
        with TreeIndex(repo) as index:
            for path in sorted({path for patch in patches for path in patch.files}):
                installed = site / path.removeprefix(PREFIX)
                if not (path.startswith(PREFIX) and installed.is_file()):
                    raise errors.WrongBaseError(
                        f"the series changes {path}, which is not installed",
                        where=str(site),
                        remedy="the patch is for another release: see the series' folder",
                    )
                index.put(path, "100644", installed.read_bytes())
            base = index.tree()
        result = apply_series(repo, base, patches).result
        listing = repo.git("diff-tree", "-r", "-z", "--name-only", base, result).stdout.decode()
        changed = {
            path.removeprefix(PREFIX): repo.git("cat-file", "blob", f"{result}:{path}").stdout
            for path in filter(None, listing.split("\0"))
        }
    for path, content in changed.items():
        with atomic_path(site / path) as aside:
            aside.write_bytes(content)
    return [site / path for path in changed]
