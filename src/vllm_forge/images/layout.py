"""OCI image layouts on disk: read, checked, written (image-spec v1.1, image-layout.md)."""

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_forge.host import READ_ONLY, atomic_path, canonical, link_or_copy, parse_json, read_plain
from vllm_forge.host.files import file_digest, inode
from vllm_forge.images.errors import LayoutError
from vllm_forge.images.layer import LayerBlob, plain_digest

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
# The tag, as skopeo reads it; and the full name, as `docker load` does.
REF_NAME = "org.opencontainers.image.ref.name"
IMAGE_NAME = "io.containerd.image.name"
AUTHOR = "vllm-forge: "  # begins a layer's line in the history
VERSION = b'{"imageLayoutVersion":"1.0.0"}'
AGAIN = "build it again, or get it again from where it was published"


@dataclass(frozen=True, kw_only=True)
class ImageLayer:
    """A blob of an image, and what the image's history calls it."""

    blob: LayerBlob
    name: str


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image in a layout's folder; ``digest`` is the SHA-256 of its manifest, hex."""

    path: Path
    digest: str
    config: dict[str, Any]
    manifest: dict[str, Any]

    def blob(self, digest: str) -> Path:
        """Path of a blob, given as ``sha256:<hex>`` or hex."""
        return self.path / "blobs" / "sha256" / digest.removeprefix("sha256:")

    @property
    def layers(self) -> tuple[ImageLayer, ...]:
        """Its layers, lowest first."""
        diff_ids, history = self.config["rootfs"]["diff_ids"], self.config["history"]
        return tuple(
            ImageLayer(
                blob=LayerBlob(
                    path=self.blob(row["digest"]),
                    digest=hex_digest(row["digest"]),
                    diff_id=hex_digest(diff_id),
                    size=row["size"],
                    media_type=row["mediaType"],
                ),
                name=entry["created_by"].removeprefix(AUTHOR),
            )
            for row, diff_id, entry in zip(self.manifest["layers"], diff_ids, history, strict=True)
        )

    @property
    def size(self) -> int:
        """Bytes that a pull transfers: all layers and the config."""
        layers: int = sum(layer["size"] for layer in self.manifest["layers"])
        return layers + int(self.manifest["config"]["size"])


def write_image(
    target: Path,
    *,
    layers: Sequence[ImageLayer],
    config: dict[str, Any],
    epoch: int,
    name: str,
) -> Image:
    """Write a layout with one image; it appears under its name when it is complete.

    Blobs are hard links to the layer store where the file system allows it.

    ``target`` is replaced if it exists. ``layers``: lowest first; ``config``: Env, User and so on;
    ``epoch``: creation time, Unix seconds; ``name``: ``repository:tag``, not part of the digest.
    """
    created = timestamp(epoch)
    image_config = {
        "architecture": "amd64",
        "config": config,
        "created": created,
        "history": [
            {"created": created, "created_by": f"{AUTHOR}{layer.name}"} for layer in layers
        ],
        "os": "linux",
        "rootfs": {
            "diff_ids": [f"sha256:{layer.blob.diff_id}" for layer in layers],
            "type": "layers",
        },
    }
    with atomic_path(target) as aside:
        blobs = aside / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        for layer in layers:
            if not (blob := blobs / layer.blob.digest).exists():  # it does: two equal layers
                link_or_copy(layer.blob.path, blob)
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": _put(blobs, CONFIG, image_config),
            "layers": [
                _descriptor(layer.blob.media_type, layer.blob.digest, layer.blob.size)
                for layer in layers
            ],
        }
        digest = hex_digest(_put(blobs, MANIFEST, manifest)["digest"])
        set_name(aside, digest, name)
    return Image(path=target, digest=digest, config=image_config, manifest=manifest)


def _descriptor(media_type: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": size}


def timestamp(epoch: int) -> str:
    """A time in Unix seconds as OCI configs and labels have it (RFC 3339)."""
    return datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def set_name(layout: Path, digest: str, name: str) -> None:
    """Write the files around the blobs of an image, given by its manifest's SHA-256 in hex.

    ``name``: its ``repository:tag``, which may become another one; digests stay.
    """
    for file, content in _around(layout, digest, name).items():
        with atomic_path(layout / file) as aside:
            aside.write_bytes(content)


def has_name(image: Image, name: str) -> bool:
    """Whether the files around the blobs are those of an image with that name."""
    try:
        files = _around(image.path, image.digest, name)
        return all(read_plain(image.path / file) == files[file] for file in files)
    except (OSError, ValueError):
        return False


def _around(layout: Path, digest: str, name: str) -> dict[str, bytes]:
    size = (layout / "blobs" / "sha256" / digest).stat().st_size
    entry = _descriptor(MANIFEST, digest, size) | {
        "annotations": {REF_NAME: name.rpartition(":")[2], IMAGE_NAME: name},
        "platform": {"architecture": "amd64", "os": "linux"},
    }
    index = canonical({"schemaVersion": 2, "manifests": [entry]})
    return {"oci-layout": VERSION, "index.json": index}


def read_image(path: Path) -> Image:
    """Read the one image of a layout; manifest and config are hashed, layers not (see ``verify``).

    Raises LayoutError: a file is missing, is not JSON, or not what its digest or size says.
    """
    try:
        index = parse_json(read_plain(path / "index.json"))
        (entry,) = index["manifests"]
        blobs, digest = path / "blobs" / "sha256", hex_digest(entry["digest"])
        manifest = parse_json(_hashed(blobs / digest))
        config = parse_json(_hashed(blobs / hex_digest(manifest["config"]["digest"])))
        for layer in manifest["layers"]:
            blob, size = blobs / hex_digest(layer["digest"]), layer["size"]
            if blob.parent != blobs:
                raise ValueError(f"invalid digest {layer['digest']!r}")  # noqa: TRY301
            if (actual := blob.stat().st_size) != size:
                raise ValueError(f"{blob.name} has {actual} bytes, not {size}")  # noqa: TRY301
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        if not path.exists():
            remedy = "build it, or correct the folder; an image of a registry is HOST/NAME:TAG"
            raise LayoutError("image not found", where=path, remedy=remedy) from error
        if path.is_file():
            what = "not a folder: expected that of an OCI layout"
            remedy = f"unpack an archive: mkdir image && tar -xf {shlex.quote(path.name)} -C image"
            raise LayoutError(what, where=path, remedy=remedy) from error
        what = f"not an OCI layout with one image: {error}"
        raise LayoutError(what, where=path, remedy=AGAIN) from error
    return Image(path=path, digest=digest, config=config, manifest=manifest)


def _hashed(blob: Path) -> bytes:
    content = read_plain(blob)
    if hashlib.sha256(content).hexdigest() != blob.name:
        raise ValueError(f"blob {blob.name} was changed")
    return content


def verify(
    image: Image, *, unpacked: bool = False, hashed: Mapping[str, list[int]] | None = None
) -> None:
    """Hash every blob of an image; ``unpacked``: layers also without their compression.

    ``hashed``: digest in hex -> ``inode`` of a blob that was, and is again if it was touched since.

    Raises LayoutError: the SHA-256 of a blob is not its name, or not its ``diff_id``; or there are
    other files, which a tar of the layout would carry.
    """
    digests = [image.digest, image.manifest["config"]["digest"]]
    digests += [layer["digest"] for layer in image.manifest["layers"]]
    for digest in digests:
        path = image.blob(digest)
        try:
            if hashed and hashed.get(path.name) == inode(path.lstat()):
                continue
            actual = file_digest(path)
        except (OSError, ValueError) as error:
            actual = f"of nothing: {error}"
        if actual != path.name:
            what = f"blob {path.name} has sha256 {actual}: it was changed"
            raise LayoutError(what, where=path, remedy=AGAIN)
    known = {"index.json", "oci-layout", *(f"blobs/sha256/{hex_digest(name)}" for name in digests)}
    paths = [path for path in image.path.rglob("*") if path.is_symlink() or not path.is_dir()]
    if others := sorted({path.relative_to(image.path).as_posix() for path in paths} - known):
        what = f"{others[0]} is not of its image"
        raise LayoutError(what, where=image.path, remedy=AGAIN)
    blobs = [layer.blob for layer in image.layers] if unpacked else []
    with ThreadPoolExecutor() as pool:
        for blob, actual in zip(blobs, pool.map(plain_digest, blobs), strict=True):
            if actual != blob.diff_id:
                raise LayoutError(
                    f"the layer is sha256 {actual} when unpacked; the image says {blob.diff_id}",
                    where=blob.path,
                    remedy="the cache was damaged when this image was built: delete the layout, "
                    "run nox -s forge -- clean --all, and build again",
                )


def hex_digest(digest: str) -> str:
    """The hex digits of ``sha256:<hex>``."""
    return digest.removeprefix("sha256:")


def blob_times(image: Image) -> dict[str, int]:
    """Digest -> modification time (ns) of an image's layers.

    They show a blob that was written since the build, without hashing 4 GB.
    """
    digests = [str(layer["digest"]) for layer in image.manifest["layers"]]
    return {digest: image.blob(digest).stat().st_mtime_ns for digest in digests}


def _put(blobs: Path, media_type: str, value: dict[str, Any]) -> dict[str, Any]:
    content = canonical(value)
    digest = hashlib.sha256(content).hexdigest()
    path = blobs / digest
    path.write_bytes(content)
    path.chmod(READ_ONLY)
    return _descriptor(media_type, digest, len(content))
