"""An image where it was published, a registry or a folder, with what is attached to it.

Everything is read by digest: a tag is resolved once, and what it names later does not matter.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_forge.errors import ForgeError, UsageError
from vllm_forge.host import parse_json, read_plain
from vllm_forge.host.files import file_digest
from vllm_forge.images.errors import LayoutError
from vllm_forge.images.layout import MANIFEST, Image, ImageLayer, read_image
from vllm_forge.release.errors import BundleFileError, RegistryContentError
from vllm_forge.release.referrers import PREDICATE, referrers
from vllm_forge.release.registry import Reference, Repository
from vllm_forge.signing.bundle import LARGEST, MEDIA_TYPE

SUFFIX = ".sigstore.json"
CONFIG_BYTES = 8 << 20
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
                raise LayoutError(what, where=str(layer.blob.path), remedy=remedy)
        return fetched


def from_registry(reference: Reference, ca: Path | None = None) -> Published:
    """Read an image of a registry; its tag, if it has one, is resolved here and never again.

    Raises UsageError: neither tag nor digest, and no release is called "latest";
    ManifestMissingError, RegistryContentError, and what ``Repository`` raises.
    """
    if (name := reference.digest or reference.tag) is None:
        what, remedy = "the image has neither a tag nor a digest", "give HOST/NAME:TAG or @DIGEST"
        raise UsageError(what, where=str(reference), remedy=remedy)
    repository = Repository(reference, ca=ca)
    found = repository.manifest(name)
    where = reference.at(found.digest)
    try:
        if found.media_type != MANIFEST:
            raise ValueError(f"its type is {found.media_type}")  # noqa: TRY301
        config = parse_json(repository.blob(found.blobs()[0].digest, CONFIG_BYTES))
        image = _image(found.digest, parse_json(found.content), config, Path())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"not an image of vllm-forge: {error!r}"
        remedy = "give the reference of an image that vllm-forge released"
        raise RegistryContentError(what, where=str(where), remedy=remedy) from None
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
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what, remedy = f"not an image of vllm-forge: {error!r}", "give the folder of a mirror"
        raise LayoutError(what, where=str(path), remedy=remedy) from None
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
    """Where the bundles of an image in a folder are."""
    return layout.with_name(f"{layout.name}.attest")


def read_bundles(folder: Path) -> Iterator[Attached]:
    """The bundles ``<kind>.sigstore.json`` of a folder."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        stated = path.name.removesuffix(SUFFIX)
        try:
            yield Attached(where=str(path), stated=stated, content=read_plain(path, LARGEST))
        except (OSError, ValueError) as error:
            what, remedy = f"cannot read a bundle: {error}", "see who wrote it, and get it again"
            fault = BundleFileError(what, where=str(path), remedy=remedy)
            yield Attached(where=str(path), stated=stated, error=fault)
