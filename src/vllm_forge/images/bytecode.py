"""Python's bytecode: what runs in an image's files leave, and the layer of a prewarmed image.

That of runs takes longer to make than the checks. It is code that nothing can be compared with, so
it is used again only if it is as it was left. That of the layer is made by ``compile_sources``.
"""

import _imp
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from vllm_forge.errors import shortened
from vllm_forge.host import gigabytes, hash_of, remove
from vllm_forge.host.files import folder_stamp, open_plain, read_plain, read_sealed, write_sealed
from vllm_forge.images import compile_sources
from vllm_forge.images.errors import ForeignFileError
from vllm_forge.images.layer import LayerBlob, ZstdLayerWriter, overlay, plain_path
from vllm_forge.images.layout import ImageLayer
from vllm_forge.images.store import StoredLayer, keep_layer, make_folders

LAYER = "bytecode"
FORMAT = 1
MOST = 2 << 30  # bytes of a tar; line 0.26 has 404 MB
COMPILER = Path(compile_sources.__file__)
HEADER = 16  # bytes of a .pyc before the code: magic number, flags, hash of the source
PLACE = re.compile(r"(.+/)__pycache__/([^/]+)\.cpython-(\d+)\.pyc")
SHOWN = 10


@contextmanager
def kept_bytecode(folder: Path) -> Iterator[None]:
    """Let runs use what earlier ones left in a folder, unless something else changed it since.

    Code of the image writes it, and so does another build that uses it at the same time: what a run
    finds of that is deleted, and Python compiles it again.
    """
    seal, kept = folder.with_name(f"{folder.name}.json"), False
    with suppress(OSError, ValueError):  # of a first run; of a damaged seal
        kept = read_sealed(seal) == {"files": folder_stamp(folder)}
    if not kept:
        remove(folder)
    try:
        yield
    finally:
        seal.unlink(missing_ok=True)
        with suppress(OSError, ValueError):  # no run took place; or it left no plain files
            write_sealed(seal, {"files": folder_stamp(folder)})


def bytecode_key(layers: Sequence[ImageLayer], epoch: int) -> str:
    """Hash of what the bytecode of these layers is a function of."""
    return hash_of([FORMAT, epoch, COMPILER.read_text(), [layer.blob.diff_id for layer in layers]])


def bytecode_layer(key: str, tar: Path, epoch: int) -> StoredLayer:
    """The layer of what ``compile_sources`` wrote, unless it is there; times are ``epoch``.

    Raises ForeignFileError: the tar has something else, or too much.
    """

    def write(folder: Path, _: object) -> tuple[LayerBlob, dict[str, Any]]:
        with open_plain(tar) as file, ZstdLayerWriter(folder, epoch) as layer:
            size = tar.stat().st_size
            if size > MOST:
                what = f"bytecode of {gigabytes(size)}, at most {gigabytes(MOST)} are taken"
                raise ForeignFileError(what, where=tar)
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - of an open file
            rows = {plain_path(info.name): info for info in archive}
            for name, info in rows.items():
                if not (info.isreg() and PLACE.fullmatch(name) and name.isprintable()):
                    raise ForeignFileError(f"{name!r} is not a file of bytecode", where=tar)
            for parent in make_folders(folder / "files", rows):
                layer.directory(parent)
            for name in sorted(rows):
                content = cast("IO[bytes]", archive.extractfile(rows[name]))
                layer.data(name, content.read())
            return layer.close(), {}

    return keep_layer(key, write)


def bytecode_problems(
    paths: Mapping[str, Path],
    python: str,
    written: Mapping[str, Path],
    system: Sequence[LayerBlob],
) -> list[str]:
    """What is wrong with the bytecode ``paths``: each must be of the source above its folder.

    By the hash of that source in its header, which Python ``python`` (``3.13``) compares at each
    import, too (PEP 552). Sources are ``written`` files, else in layers of the ``system``.
    """
    problems, sources = [], {}
    for path in paths:
        place = PLACE.fullmatch(path)
        if place is None or place[3] != python.replace(".", ""):
            problems.append(f"not bytecode of Python {python}: /{path}")
        else:
            sources[path] = f"{place[1]}{place[2]}.py"
    wanted = set(sources.values()) - written.keys()

    def read(path: str, info: tarfile.TarInfo, tar: tarfile.TarFile) -> bytes | None:
        regular = path in wanted and info.isreg()
        return cast("IO[bytes]", tar.extractfile(info)).read() if regular else None

    contents = {path: content for path, (_, content) in overlay(system, read).items()}
    for path, source in sources.items():
        with open_plain(paths[path]) as file:
            header = file.read(HEADER)
        content = read_plain(written[source]) if source in written else contents.get(source)
        magic, flags, digest = header[:4], header[4:8], header[8:]
        if content is None:
            problems.append(f"no source: /{path}")
        elif flags != compile_sources.CHECKED_HASH.to_bytes(4, "little") or digest != (
            _imp.source_hash(int.from_bytes(magic, "little"), content)
        ):
            problems.append(f"not of its source: /{path}")
    return shortened(problems, SHOWN)
