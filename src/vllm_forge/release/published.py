"""An image where it was published, a registry or a folder, with what is attached to it.

Everything is read by digest: a tag is resolved once, and what it names later does not matter.
"""

import io
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zstandard import ZstdError

from vllm_forge.errors import ForgeError, UsageError
from vllm_forge.host import cache_root, parse_json, printable, read_plain
from vllm_forge.host.files import file_digest
from vllm_forge.images.content import STACK, labels
from vllm_forge.images.errors import LayoutError
from vllm_forge.images.layer import GZIP, LayerBlob, plain_tar
from vllm_forge.images.layout import MANIFEST, Image, ImageLayer, read_image
from vllm_forge.release.errors import BundleFileError, ImageContentError, RegistryContentError
from vllm_forge.release.referrers import PREDICATE, referrers
from vllm_forge.release.registry import Reference, Repository
from vllm_forge.signing.bundle import LARGEST, MALFORMED, MEDIA_TYPE

SUFFIX = ".sigstore.json"
CONFIG_BYTES = 8 << 20
LAYER_BYTES = 64 << 20  # of a layer that may hold stack.json; that of a series has 1 MB or less
PLAIN_BYTES = 256 << 20
STACK_BYTES = 1 << 20  # that of a full image has 25 kB
NEEDED = {"compute_capability", "debian", "packages", "series", "vllm_release"}
UNREADABLE = (OSError, EOFError, zlib.error, ZstdError, tarfile.TarError, *MALFORMED)
MOST_LAYERS = 125  # maxLayerDepth of docker (github.com/moby/moby, layer/layer_store.go)


@dataclass(frozen=True, kw_only=True)
class Attached:
    """A bundle, or why it could not be read.

    ``stated``: what its surroundings say it is, a predicate type or the name of a file.
    """

    where: str
    stated: str
    content: bytes = field(default=b"", repr=False)
    error: ForgeError | None = None


@dataclass(frozen=True, kw_only=True)
class Published:
    """An image: manifest and configuration are what their digests say.

    ``image``: its layers are files only after ``fetch``; ``tag``: by which it was asked for;
    ``download``: where layers are not on this host, puts them into a folder.
    """

    where: str
    tag: str | None
    image: Image
    attached: tuple[Attached, ...]
    download: Callable[[Sequence[ImageLayer], Path], None] | None = None

    @property
    def digest(self) -> str:
        return f"sha256:{self.image.digest}"

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.image.config["config"].get("Labels") or {}
        return labels

    def fetch(self, layers: Sequence[ImageLayer], work: Path) -> tuple[ImageLayer, ...]:
        """These layers as files, below ``work`` where they are not on this host; LayoutError."""
        image = self.image
        if self.download is not None:
            image = replace(image, path=work)
            image.blob("").mkdir(parents=True, exist_ok=True)
            self.download(layers, image.blob(""))
        names = {layer.blob.digest for layer in layers}
        fetched = tuple(layer for layer in image.layers if layer.blob.digest in names)
        for layer in fetched:
            if (actual := file_digest(layer.blob.path)) != layer.blob.digest:
                what = f"blob {layer.blob.digest} has sha256 {actual}"
                remedy = "get the folder again from where it was published"
                raise LayoutError(what, where=layer.blob.path, remedy=remedy)
        return fetched


def from_registry(reference: Reference, ca: Path | None = None) -> Published:
    """Read an image of a registry; its tag, if it has one, is resolved here and never again.

    Raises UsageError: neither tag nor digest, and no release is called "latest";
    ManifestMissingError, RegistryContentError, and what ``Repository`` raises.
    """
    if (name := reference.digest or reference.tag) is None:
        what, remedy = "the image has neither a tag nor a digest", "give HOST/NAME:TAG or @DIGEST"
        raise UsageError(what, where=reference, remedy=remedy)
    repository = Repository(reference, ca=ca)
    found = repository.manifest(name)
    where = reference.at(found.digest)
    try:
        if found.media_type != MANIFEST:
            raise ValueError(f"its type is {found.media_type}")
        config = parse_json(repository.blob(found.blobs()[0].digest, CONFIG_BYTES))
        image = _image(found.digest, parse_json(found.content), config, Path())
    except MALFORMED as error:
        what = f"not an image of vllm-forge: {error!r}"
        remedy = "give the reference of an image that vllm-forge released"
        raise RegistryContentError(what, where=where, remedy=remedy) from None
    blobs = {blob.digest: blob for blob in found.blobs()}

    def download(layers: Sequence[ImageLayer], folder: Path) -> None:
        rows = [blobs[f"sha256:{layer.blob.digest}"] for layer in layers]
        repository.stream_blobs(rows, folder)

    return Published(
        where=str(where), tag=reference.tag, image=image, download=download,
        attached=tuple(_attached(repository, found.digest)),
    )  # fmt: skip


def _attached(repository: Repository, digest: str) -> Iterator[Attached]:
    for row in referrers(repository, digest):
        if row.artifact_type != MEDIA_TYPE:
            continue
        where = str(repository.reference.at(row.manifest.digest))
        stated = row.artifact.annotations.get(PREDICATE, "")
        try:
            yield Attached(where=where, stated=stated, content=row.bundle(repository))
        except RegistryContentError as error:
            yield Attached(where=where, stated=stated, error=error)


def from_layout(path: Path) -> Published:
    """Read an OCI layout, and the bundles in the folder beside it; LayoutError."""
    image = read_image(path)
    try:
        image = _image(f"sha256:{image.digest}", image.manifest, image.config, path)
    except MALFORMED as error:
        what, remedy = f"not an image of vllm-forge: {error!r}", "give the folder of a mirror"
        raise LayoutError(what, where=path, remedy=remedy) from None
    return Published(
        where=f"{path}@sha256:{image.digest}", tag=None, image=image,
        attached=tuple(read_bundles(attest_folder(path))),
    )  # fmt: skip


def _image(digest: str, manifest: Any, config: Any, path: Path) -> Image:
    """Raise what is wrong with an image's fields, which later steps take for granted."""
    image = Image(
        path=path, digest=digest.removeprefix("sha256:"), config=config, manifest=manifest
    )
    labels = config["config"].get("Labels") or {}
    if not all(isinstance(value, str) for value in (config["created"], *labels.values())):
        raise TypeError("a label is not text")
    if not all(isinstance(layer.blob.size, int) for layer in image.layers):
        raise TypeError("the size of a layer is not a number")
    if len(image.layers) > MOST_LAYERS:
        raise ValueError(f"more than {MOST_LAYERS} layers")
    return image


def attest_folder(layout: Path) -> Path:
    """Where the bundles of an image in a folder are: also of ``.``, and behind a link."""
    layout = layout.resolve()
    return layout.with_name(f"{layout.name}.attest")


def read_bundles(folder: Path) -> Iterator[Attached]:
    """The bundles ``<kind>.sigstore.json`` of a folder."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        stated = path.name.removesuffix(SUFFIX)
        try:
            yield Attached(where=str(path), stated=stated, content=read_plain(path, LARGEST))
        except (OSError, ValueError) as error:
            what, remedy = f"cannot read a bundle: {error}", "see who wrote it, and get it again"
            fault = BundleFileError(what, where=path, remedy=remedy)
            yield Attached(where=str(path), stated=stated, error=fault)


@contextmanager
def work_folder() -> Iterator[Path]:
    """A folder of the cache, for layers that are not on this host."""
    parent = cache_root() / "work"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="verify-", dir=parent) as work:
        yield Path(work)


def read_stack(published: Published) -> dict[str, Any]:
    """stack.json of an image: of the highest of its layers that has it; ImageContentError."""
    try:
        with work_folder() as work:
            for layer in reversed(published.image.layers):
                if layer.blob.media_type == GZIP and layer.blob.size <= LAYER_BYTES:
                    (fetched,) = published.fetch([layer], work)
                    if (content := _member(fetched.blob, STACK)) is not None:
                        stack: dict[str, Any] = parse_json(content)
                        labels(stack, "")  # has what they are made of
                        if missing := NEEDED - stack.keys():
                            raise LookupError(f"it lacks {', '.join(sorted(missing))}")
                        if not all(
                            isinstance(stack[name], dict) for name in ("debian", "packages")
                        ):
                            raise TypeError("its packages are not a table")
                        return stack
        why = "no layer has it"
    except UNREADABLE as error:
        why = printable(f"{type(error).__name__}: {error}")
    what = f"cannot read /{STACK}: {why}"
    remedy = "give an image that vllm-forge built"
    raise ImageContentError(what, where=published.where, remedy=remedy)


def _member(blob: LayerBlob, name: str) -> bytes | None:
    """A small file of a layer, of whose tar PLAIN_BYTES are read: a header can be of any size."""
    with plain_tar(blob) as plain:
        start = io.BytesIO(plain.read(PLAIN_BYTES))
    with tarfile.open(fileobj=start, mode="r:") as tar:
        for info in tar:
            if info.name == name and info.isreg() and info.size <= STACK_BYTES:
                file = tar.extractfile(info)
                return None if file is None else file.read()
            if info.offset_data + info.size > PLAIN_BYTES:
                break
    return None
