"""Kernels that JIT compilers made before, as a layer: the first start does not compile them again.

They lie below /opt/vllm-forge/jit. Compilers write where they read, so the image's entrypoint
copies them to the /cache volume once, and the compilers' variables point there. Triton, vLLM and
ninja keep absolute paths in their caches and miss what has moved, so the place has the stack in its
name, not the content: the GPU suite compiles at the very same one (``place_of``).
"""

import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NoReturn, cast

from vllm_forge.host import gigabytes, hash_of, open_plain, read_data
from vllm_forge.host.files import file_digest
from vllm_forge.images.errors import ForeignFileError
from vllm_forge.images.layer import CHUNK, LayerBlob, ZstdLayerWriter, members, read_blocks
from vllm_forge.images.store import StoredLayer, keep_layer, make_folders
from vllm_forge.matrix import FrozenModel, ImageCell
from vllm_forge.matrix.errors import RecordFileError

FORMAT = 2
MOST = 32 << 30  # bytes of a folder; the largest that was seen has 1.5 GB
BAKED = "/opt/vllm-forge/jit"
SCRIPT = "/opt/vllm-forge/prewarmed"
# Folder of a compiler -> the variable that names it.
FOLDERS = {
    "vllm": "VLLM_CACHE_ROOT",
    "triton": "TRITON_CACHE_DIR",
    "inductor": "TORCHINDUCTOR_CACHE_DIR",
    "deep_gemm": "DG_JIT_CACHE_DIR",
    "flashinfer": "FLASHINFER_WORKSPACE_BASE",
    "tilelang": "TILELANG_CACHE_DIR",
    "cute": "CUTE_DSL_CACHE_DIR",
    "cuda": "CUDA_CACHE_PATH",
    "trtllm": "TRTLLM_DG_CACHE_DIR",
}
PLACE, CONTENT = "VLLM_FORGE_JIT", "VLLM_FORGE_JIT_SHA256"
ENTRYPOINT = f"""#!/bin/sh
# The first start of a volume copies the kernels there; what is compiled later joins them.
set -eu
mark="${{{PLACE}}}.${{{CONTENT}}}"
join() {{
    # Kernels of this stack are there: of an image that carried others, or of one that starts now.
    # A link appears whole, so that who compiles there at the same time never reads half a file.
    # Named before the loops: of a pipe, only the last command's failure counts.
    folders="$(cd "$1" && find . -type d)"
    files="$(cd "$1" && find . -type f)"
    printf '%s\\n' "${{folders}}" | while IFS= read -r name; do
        mkdir -p "${{{PLACE}}}/${{name}}"
    done
    printf '%s\\n' "${{files}}" | while IFS= read -r name; do
        [ -e "${{{PLACE}}}/${{name}}" ] || ln "$1/${{name}}" "${{{PLACE}}}/${{name}}" ||
            [ -e "${{{PLACE}}}/${{name}}" ]
    done
}}
if [ ! -e "${{mark}}" ] || [ ! -d "${{{PLACE}}}" ]; then
    mkdir -p "${{{PLACE}%/*}}"
    # Not named by the process: in each container it is the first.
    aside="$(mktemp -d "${{{PLACE}}}.XXXXXX")"
    trap 'rm -rf "${{aside}}"' EXIT
    cp -R --preserve=timestamps {BAKED}/. "${{aside}}"
    chmod 755 "${{aside}}"
    [ -d "${{{PLACE}}}" ] || mv -T "${{aside}}" "${{{PLACE}}}" || [ -d "${{{PLACE}}}" ]
    [ ! -d "${{aside}}" ] || join "${{aside}}"
    : >"${{mark}}"
    rm -rf "${{aside}}"
    trap - EXIT
fi
exec "$@"
"""


def place_of(key: Mapping[str, str]) -> str:
    """Where kernels of a stack (``gputest.launch.cache_key``) are in a container at all times."""
    return f"/cache/jit/{hash_of(dict(key), sort_keys=True)[:16]}"


@dataclass(frozen=True, kw_only=True)
class Prewarm:
    """Caches that a run of the same stack (``key``) left in a folder."""

    folder: Path
    key: Mapping[str, str]
    digest: str  # see ``tree_digest``

    @property
    def place(self) -> str:
        return place_of(self.key)

    def environment(self) -> dict[str, str]:
        folders = {variable: f"{self.place}/{name}" for name, variable in FOLDERS.items()}
        return folders | {PLACE: self.place, CONTENT: self.digest}

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in require_plain(self.folder))

    def record(self) -> dict[str, Any]:
        """For stack.json."""
        return {"sha256": self.digest, "key": dict(self.key), "bytes": self.size}


class PrewarmLock(FrozenModel):
    """``records/prewarm/<SKU>--<line>.json``: the kernels that a released image may carry.

    A commit does not determine the set, so it names its hash. ``image``: digest of the
    image in which a run of ``tiers`` compiled it; the receipts of these tiers name it, too.
    """

    schema_version: Literal[1] = 1
    sha256: str
    bytes: int
    key: dict[str, str]
    image: str
    tiers: tuple[str, ...]


def prewarm_lock(root: Path, cell: ImageCell) -> tuple[Path, PrewarmLock | None]:
    """Path of a cell's lock, and what it says, if it is there; RecordFileError: it is broken."""
    path = root / "records" / "prewarm" / f"{cell.sku_name}--{cell.line_name}.json"
    if not path.exists():
        return path, None
    remedy = f"write it again: nox -s forge -- gpu prewarm {cell.sku_name} FOLDER"
    return path, read_data(
        path, PrewarmLock.model_validate, RecordFileError, what="prewarm lock", remedy=remedy
    )


def prewarm_key(prewarm: Prewarm, epoch: int) -> str:
    return hash_of([FORMAT, epoch, prewarm.digest, ENTRYPOINT])


def prewarm_layer(prewarm: Prewarm, epoch: int) -> StoredLayer:
    """The layer of what JIT compilers made, with the entrypoint's script; times are ``epoch``."""
    files = {
        f"{BAKED}/{path.relative_to(prewarm.folder).as_posix()}"[1:]: path
        for path in require_plain(prewarm.folder)
    }

    def write(folder: Path, _: object) -> tuple[LayerBlob, dict[str, Any]]:
        with ZstdLayerWriter(folder, epoch) as layer:
            for parent in make_folders(folder / "files", [*files, SCRIPT[1:]]):
                layer.directory(parent)
            for name, path in sorted(files.items()):
                mode = 0o755 if path.stat().st_mode & 0o111 else 0o644
                layer.stream(name, path.stat().st_size, mode, read_blocks(path))
            layer.data(SCRIPT[1:], ENTRYPOINT.encode(), 0o755)
            if tree_digest(folder / "files" / BAKED[1:]) != prewarm.digest:
                raise _foreign("the folder changed while it was read", prewarm.folder)
            return layer.close(), {}

    return keep_layer(prewarm_key(prewarm, epoch), write)


def unpack_prewarm(blob: LayerBlob, folder: Path) -> None:
    """Write the kernels of a ``prewarm_layer`` to a folder, as they were before."""
    for name, info, tar in members(blob):
        if name.startswith(f"{BAKED[1:]}/") and info.isreg():
            file = cast("IO[bytes]", tar.extractfile(info))
            path = folder / name.removeprefix(f"{BAKED[1:]}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as copy:
                shutil.copyfileobj(file, copy)
            path.chmod(info.mode & 0o777)


def require_plain(folder: Path) -> list[Path]:
    """All files of a folder that code of a container wrote, sorted.

    Raises ForeignFileError: a link, FIFO, device, socket, a file with a second name, a name with
    control characters, or more than MOST bytes: such a folder could bring files of the host into an
    image, or hold the build. OSError: a part of it cannot be read.
    """
    files, size = [], 0
    found = [  # rglob would leave out what it cannot read
        Path(place, name)
        for place, folders, names in os.walk(folder, onerror=_raise)
        for name in (*folders, *names)
    ]
    for path in sorted(found):
        status = path.lstat()
        if not path.name.isprintable():
            raise _foreign(f"{path.name!r} is not a printable name", folder)
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise _foreign(f"{path.name} is a link or not a plain file", path)
        size += status.st_size
        files.append(path)
    if size > MOST:
        raise _foreign(
            f"the folder has {gigabytes(size)}, at most {gigabytes(MOST)} are taken", folder
        )
    return files


def copy_plain(source: Path, target: Path) -> None:
    """Copy what ``require_plain`` accepts, whatever a program does to the folder meanwhile.

    Each file is opened once, and judged when it is open. Raises ForeignFileError: see there.
    """
    size = 0
    # It keeps folders open, and follows no link.
    for place, _, names, folder in os.fwalk(source, onerror=_raise):
        below = target / Path(place).relative_to(source)
        below.mkdir()
        for name in names:
            try:
                file = open_plain(Path(name), folder)
            except (OSError, ValueError) as error:
                raise _foreign(f"{name} is a link or not a plain file", source) from error
            with file, (below / name).open("xb") as copy:
                status = os.fstat(file.fileno())
                while (block := file.read(CHUNK)) and size <= MOST:
                    size += copy.write(block)
            if status.st_nlink != 1 or size > MOST:
                raise _foreign(f"{name} has a second name or too many bytes", source)
            (below / name).chmod(status.st_mode & 0o777)
            os.utime(below / name, ns=(status.st_atime_ns, status.st_mtime_ns))  # compilers ask
    require_plain(target)


def _raise(error: OSError) -> NoReturn:
    raise error


def _foreign(what: str, where: Path) -> ForeignFileError:
    remedy = "do not use this folder; run the suite with an empty --caches"
    return ForeignFileError(what, where=where, remedy=remedy)


def tree_digest(folder: Path) -> str:
    """SHA-256 over the names, modes and contents of a folder's plain files, and over its links."""
    rows = []
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = ""
        if stat.S_ISLNK(mode):
            content = str(path.readlink())
        elif stat.S_ISREG(mode):
            content = file_digest(path)
        if content:
            rows.append((path.relative_to(folder).as_posix(), bool(mode & 0o111), content))
    return hash_of(rows)
