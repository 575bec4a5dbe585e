"""Copies of an image with what is attached to it, which other tools leave behind.

From a registry to another, or to a folder for a host without network, and from there to a registry.
A folder is an OCI layout ``NAME``, with the bundles beside it in ``NAME.attest``. All bytes are
checked against their digest; a copy that was interrupted goes on where it stopped; a tag is set
last.

skopeo copies images: the very bytes, by digest, so that no tag names them yet. It finds logins
itself (release/transport.py reads the same files), so that no password is in an argument, which
every user of the host could read.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_forge.errors import UsageError, first_problem
from vllm_forge.host import (
    READ_ONLY,
    Runner,
    atomic_path,
    cache_root,
    console,
    exclusive,
    hash_of,
    require_disk,
    tree_bytes,
)
from vllm_forge.images import read_image, verify
from vllm_forge.images.layout import set_name
from vllm_forge.release.errors import MirrorError
from vllm_forge.release.evidence import bundle_name
from vllm_forge.release.published import SUFFIX, attest_folder, read_bundles
from vllm_forge.release.referrers import Referrer, attach, put_referrer, referrers
from vllm_forge.release.registry import Descriptor, Manifest, Reference, Repository, digest_of
from vllm_forge.release.transport import is_loopback
from vllm_forge.signing.bundle import MEDIA_TYPE, parse_statement, read


def push_layout(
    runner: Runner, layout: Path, reference: Reference, digest: str, *, ca: Path | None = None
) -> None:
    """Copy the one image of an OCI layout to a repository, and read its manifest back.

    Raises CommandFailedError: skopeo failed, also where the layout has another digest.
    """
    with tls_options("dest", reference, ca) as options:
        copy(runner, options, f"oci:{layout}", f"docker://{reference.at(digest)}")
    runner.act("read it back", lambda: Repository(reference, ca=ca).manifest(digest))


def copy(runner: Runner, options: list[str], source: str, target: str) -> None:
    """Let skopeo copy an image; what the target has already is not sent again."""
    runner.run(
        [
            "skopeo", "copy", "--quiet", "--all", "--preserve-digests", "--retry-times=3",
            *options, source, target,
        ]
    )  # fmt: skip


@contextmanager
def tls_options(side: str, reference: Reference, ca: Path | None) -> Iterator[list[str]]:
    """Options of skopeo for one side, ``src`` or ``dest``; see RegistrySession for the rule."""
    if ca is None:
        yield [f"--{side}-tls-verify=false"] if is_loopback(reference.registry) else []
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(ca, Path(folder, "ca.crt"))  # the suffix says what it is
        yield [f"--{side}-cert-dir={folder}"]


def mirror(
    source: Reference | Path, target: Reference | Path, runner: Runner, *, ca: Path | None = None
) -> str:
    """Copy an image with what is attached to it; returns its digest, which stays the same.

    ``ca``: PEM file of further certificate authorities, for both registries. A target's tag is set
    where it has one. Left out are referrers of referrers and, in a folder, what is not a bundle.
    """
    if isinstance(target, Reference) and target.digest:
        raise UsageError(f"invalid target {target}: expected a name, with or without a tag")
    if isinstance(source, Path):
        if isinstance(target, Path):
            raise UsageError("cannot mirror a folder to a folder: copy both with cp -a")
        return _upload(source, target, runner, ca)
    if source.digest is None and source.tag is None:
        raise UsageError(f"invalid source {source}: expected a tag or a digest")
    repository = Repository(source, ca=ca)
    manifest = repository.manifest(source.digest or source.tag or "")
    attached = referrers(repository, manifest.digest)
    if isinstance(target, Path):
        _download(repository, manifest, attached, target, str(source))
    else:
        with (
            tls_options("src", source, ca) as source_options,
            tls_options("dest", target, ca) as target_options,
        ):
            places = (f"docker://{place.at(manifest.digest)}" for place in (source, target))
            copy(runner, source_options + target_options, *places)
        destination = Repository(target, ca=ca)
        destination.manifest(manifest.digest)
        for referrer in attached:
            _copy_referrer(repository, destination, referrer)
        _finish(destination, target, manifest.digest, len(attached))
    return manifest.digest


def bundles_of(layout: Path) -> dict[Path, bytes]:
    """The bundles beside a layout, by file; BundleFileError where one is not a plain file."""
    contents = {}
    for row in read_bundles(attest_folder(layout)):
        if row.error is not None:
            raise row.error
        contents[Path(row.where)] = row.content
    return contents


def _finish(destination: Repository, target: Reference, digest: str, count: int) -> None:
    if target.tag:
        destination.set_tag(target.tag, digest)
    console.print(f"  {digest} and {count} attached manifests: {target}", markup=False)


def _copy_referrer(source: Repository, target: Repository, referrer: Referrer) -> None:
    folder = cache_root() / "mirror"
    with exclusive("mirror", wait=True):
        missing = [blob for blob in referrer.manifest.blobs() if not target.has_blob(blob.digest)]
        require_disk(folder, sum(blob.size for blob in missing))
        source.stream_blobs(missing, folder)
        for blob in missing:
            path = folder / blob.digest.removeprefix("sha256:")
            target.put_blob(path)
            path.unlink()
    put_referrer(target, referrer.manifest.content)


def _upload(layout: Path, target: Reference, runner: Runner, ca: Path | None) -> str:
    image, bundles = read_image(layout), bundles_of(layout)
    verify(image)
    statements = [parse_statement(read(bundle, str(path))) for path, bundle in bundles.items()]
    digest = f"sha256:{image.digest}"
    push_layout(runner, layout, target, digest, ca=ca)
    destination = Repository(target, ca=ca)
    subject = destination.manifest(digest)
    for bundle, statement in zip(bundles.values(), statements, strict=True):
        attach(destination, subject, bundle, statement.predicate_type)
    _finish(destination, target, digest, len(bundles))
    return digest


def _download(
    repository: Repository,
    manifest: Manifest,
    attached: tuple[Referrer, ...],
    target: Path,
    name: str,
) -> None:
    """Write the layout; its bundles first, so that a finished layout has them."""
    with exclusive(f"mirror-{hash_of(str(target.resolve()))[:16]}", wait=True):
        try:
            blobs = manifest.blobs()
        except ValueError as error:
            what = f"{manifest.digest} is not an OCI image: {first_problem(error)}"
            remedy = "give the digest of one platform's manifest"
            raise MirrorError(what, where=repository.reference, remedy=remedy) from None
        if target.exists():
            image = read_image(target)
            if f"sha256:{image.digest}" != manifest.digest:
                what = f"the folder holds another image: sha256:{image.digest}"
                remedy = f"give another folder for {manifest.digest}, or delete this one"
                raise MirrorError(what, where=target, remedy=remedy)
            verify(image)
        bundles = [row for row in attached if row.artifact_type == MEDIA_TYPE]
        kept = set(bundles_of(target).values())
        for row in bundles:
            if (content := row.bundle(repository)) not in kept:
                with atomic_path(_file(attest_folder(target), content)) as aside:
                    aside.write_bytes(content)
        if not target.exists():
            _write_layout(repository, manifest, blobs, target, name)
    left = len(attached) - len(bundles)
    console.print(
        f"  {manifest.digest} and {len(bundles)} bundles: {target}"
        + (f"; {left} attached manifests are not bundles and were left out" if left else ""),
        markup=False,
    )


def _write_layout(
    repository: Repository,
    manifest: Manifest,
    blobs: tuple[Descriptor, ...],
    target: Path,
    name: str,
) -> None:
    """Download to ``NAME.partial``, which the next call resumes, and rename that."""
    partial = target.with_name(f"{target.name}.partial")
    folder = partial / "blobs" / "sha256"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {blob.digest.removeprefix("sha256:") for blob in blobs}
    for path in folder.iterdir():
        if path.name.removesuffix(".part") not in wanted:
            path.unlink()
    require_disk(partial, sum(blob.size for blob in blobs) - tree_bytes(folder))
    repository.stream_blobs(blobs, folder)
    digest = manifest.digest.removeprefix("sha256:")
    (folder / digest).write_bytes(manifest.content)
    for path in folder.iterdir():
        path.chmod(READ_ONLY)
    set_name(partial, digest, name)
    read_image(partial)
    partial.rename(target)


def _file(folder: Path, content: bytes) -> Path:
    """Where a bundle goes: ``<kind>.sigstore.json``; with a part of its hash if that is taken."""
    name = bundle_name(content)
    if (folder / f"{name}{SUFFIX}").exists():
        name += f"-{digest_of(content).removeprefix('sha256:')[:12]}"
    return folder / f"{name}{SUFFIX}"
