"""The layers of a lock's wheels, and a SKU's own layers of their libraries.

They are written by worker processes while the next wheels download. What a SKU
cannot run is not in its image: device code for other architectures.

A CUDA library holds its kernels once per architecture. The driver loads the code that runs on
the GPU it finds and never reads the rest (CUDA C++ Programming Guide, "Application
Compatibility"; kernel coverage says what runs where). So in the SKU's copy of a library the bytes
of foreign code are zeros: headers, offsets and host code stay, nothing is relinked, and the zeros
compress away. Code in PTX stays where the SKU could compile it. The copies, and the RECORD rows of
what changed, are a layer of the SKU's own.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_forge.host import worker_pool, write_json
from vllm_forge.host.errors import CacheError, CommandFailedError
from vllm_forge.host.files import file_digest
from vllm_forge.images.content import WheelGroup, group_entries, wheel_groups
from vllm_forge.images.layer import CHUNK, LayerBlob, ZstdLayerWriter, plain_digest
from vllm_forge.images.record import LAYERS, RecordedLayer, recorded_layers
from vllm_forge.images.store import (
    SLIMMED,
    CodeRange,
    StoredLayer,
    code_ranges,
    forget,
    intact,
    keep_layer,
    layer_folder,
    make_folders,
    stored,
    usable,
    write_layer,
)
from vllm_forge.kernels.coverage.device_code import Target, runs_on
from vllm_forge.kernels.coverage.library import mapped
from vllm_forge.matrix import ImageCell
from vllm_forge.project import Project
from vllm_forge.sources import Wheelhouse
from vllm_forge.sources.wheel_format import record_hash, rewrite_record

if TYPE_CHECKING:
    from vllm_forge.images.plan import ImagePlan

T = TypeVar("T")
WORKERS = 2
NICE = 10  # the rootfs is made meanwhile
RECORDS = "opt/venv/lib/python*/site-packages/*.dist-info/RECORD"


def write_layers(plan: "ImagePlan", meanwhile: Callable[[], T], *, slim: bool = True) -> T:
    """Download the wheels of a plan, lowest layer first, and write what is not there yet.

    Returns what ``meanwhile`` does, which is called when all wheels are fetched, while worker
    processes write the layers. ``slim``: also the SKU's layers of libraries.
    """
    wheelhouse, cell = Wheelhouse(), plan.cell
    known = recorded_layers(plan.project, cell.line_name)
    with worker_pool(WORKERS, NICE) as pool:
        jobs = []
        for group in plan.groups:
            hashed = wheelhouse.fetch(group.wheels)
            if None in [usable(key) for key in group.keys[: 2 if slim else 1]]:
                jobs.append(pool.submit(_write_group, group, cell, hashed, known, slim=slim))
        result = meanwhile()
        try:
            for job in jobs:
                job.result()
        except BrokenProcessPool as error:
            raise CommandFailedError(
                "a process that writes layers was killed",
                where="the worker processes of this build",
                remedy="it may have run out of memory: free some, and build again",
            ) from error
    return result


def _write_group(
    group: WheelGroup,
    cell: ImageCell,
    hashed: Mapping[Path, list[int]],
    known: Mapping[str, RecordedLayer],
    *,
    slim: bool,
) -> None:
    """Worker process: write a layer of verified wheels, and the SKU's of its libraries."""
    epoch = cell.base.source_date_epoch
    slim_key = group.slim_key if slim else None
    cuts = slim_key is not None and stored(slim_key) is None
    whole = stored(group.key)
    if whole is not None and cuts and not intact(whole, SLIMMED):
        forget(layer_folder(group.key))
        whole = None
    if whole is None:
        paths = [Wheelhouse().verify(wheel, hashed) for wheel in group.wheels]
        entries = group_entries(group.name, paths, cell.line.python)
        whole = write_layer(
            group.key, entries, epoch,
            code_apart=group.slim_key is not None, recorded=known.get(group.key),
        )  # fmt: skip
    if slim_key is not None:
        major, minor = (int(part) for part in cell.sku.compute_capability.split("."))
        write_slim_layer(slim_key, whole, (major, minor), epoch, known.get(slim_key))


def cut(
    codes: Sequence[CodeRange], capability: tuple[int, int]
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """What of a library's device code cannot run on a compute capability.

    Returns (offset, size) of each part, ascending, not overlapping; and what it was compiled for,
    e.g. ``cubin 80`` -> bytes.
    """
    foreign = [
        code for code in codes if not runs_on(Target.parse(code.target), code.kind, capability)
    ]
    targets = Counter[str]()
    for code in foreign:
        targets[f"{code.kind} {code.target}"] += code.size
    return sorted((code.offset, code.size) for code in foreign), dict(sorted(targets.items()))


def pieces(content: bytes | mmap, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """A library's bytes in order, with zeros for ``ranges``; no piece has both."""
    position = 0
    for start, size in [*ranges, (len(content), 0)]:
        for at in range(position, start, CHUNK):
            yield content[at : min(at + CHUNK, start)]
        for at in range(0, size, CHUNK):
            yield bytes(min(CHUNK, size - at))
        position = start + size


def write_slim_layer(
    key: str,
    whole: StoredLayer,
    capability: tuple[int, int],
    epoch: int,
    recorded: RecordedLayer | None = None,
) -> StoredLayer:
    """Write a SKU's libraries of the group's layer ``whole``, which is ``intact``, under a key.

    ``capability`` is the SKU's (major, minor), ``epoch`` the time of all entries, Unix seconds;
    ``recorded``: see ``keep_layer``.
    """

    def write(folder: Path, known: RecordedLayer | None) -> tuple[LayerBlob, dict[str, Any]]:
        files = folder / "files"
        removed: dict[str, Any] = {}
        paths = (path for path in whole.code.rglob("*") if path.is_file())
        libraries = sorted(path.relative_to(whole.code).as_posix() for path in paths)
        records = sorted(whole.files.glob(RECORDS)) if libraries else []
        hashes = {} if known is None else known.libraries
        with ZstdLayerWriter(folder, epoch, known.diff_id if known else "") as layer:
            for parent in make_folders(files, libraries):
                layer.directory(parent)
            for name in libraries:
                removed[name] = _add_library(layer, whole, name, capability, hashes.get(name))
            for path in records:
                name = path.relative_to(whole.files).as_posix()
                old = path.read_bytes()
                new = update_record(old, name, removed)
                if new != old:
                    for parent in make_folders(files, [name])[-1:]:
                        layer.directory(parent)
                    layer.data(name, new)
            return layer.close(), removed

    return keep_layer(key, write, recorded)


def _add_library(
    layer: ZstdLayerWriter,
    whole: StoredLayer,
    name: str,
    capability: tuple[int, int],
    known: str | None,
) -> dict[str, Any]:
    """Add one library, whose new hash in RECORD is ``known`` or computed; return what it lacks."""
    digest, source = hashlib.sha256(), whole.code / name
    with mapped(source) as content:
        ranges, targets = cut(code_ranges(whole.folder.name, name, source), capability)

        def hashed() -> Iterator[bytes]:
            for piece in pieces(content, ranges):
                if known is None:
                    digest.update(piece)
                yield piece

        layer.stream(name, len(content), source.stat().st_mode & 0o777, hashed())
    return {
        "bytes": sum(targets.values()),
        "targets": targets,
        "sha256": known or record_hash(digest.digest()),
    }


def update_record(content: bytes, name: str, removed: Mapping[str, Any]) -> bytes:
    """A RECORD whose rows of slimmed libraries have the hashes of what is in the image.

    ``name`` is its path in the image, ``removed`` that of ``write_slim_layer``'s layer.
    """
    site = name.rsplit("/", 2)[0]

    def change(path: str, digest: str, size: str) -> tuple[str, str, str]:
        slim = removed.get(f"{site}/{path}")
        return path, f"sha256={slim['sha256']}" if slim and slim["bytes"] else digest, size

    return rewrite_record(content, change)


def record_layers(project: Project, line_name: str) -> Path:
    """Write ``recorded_layers`` of a line: those in the cache; the others stay as they are.

    Raises CacheError: a blob is not what its record says; it is read to its end.
    """
    lock, rows = project.lock(line_name), {}
    before = recorded_layers(project, line_name)
    for sku in project.matrix.line[line_name].skus:
        groups = wheel_groups(project.cell(sku, line_name), lock)
        for key in (key for group in groups for key in group.keys):
            if (layer := stored(key)) is not None:
                rows[key] = _recorded(layer)
            elif key in before:
                rows[key] = before[key]
    path = project.root / LAYERS.format(line=line_name)
    write_json(path, {key: rows[key].model_dump() for key in sorted(rows)})
    return path


def _recorded(layer: StoredLayer) -> RecordedLayer:
    blob = layer.blob
    if (file_digest(blob.path), plain_digest(blob)) != (blob.digest, blob.diff_id):
        what, remedy = "the blob of a layer is damaged", "delete its folder, and build again"
        raise CacheError(what, where=blob.path, remedy=remedy)
    libraries = {name: str(row["sha256"]) for name, row in layer.removed.items()}
    return RecordedLayer(digest=blob.digest, diff_id=blob.diff_id, libraries=libraries)
