"""Build the commit that a provenance names, and compare: the strongest check there is."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from vllm_forge.errors import shortened
from vllm_forge.host import Runner, git
from vllm_forge.images.bytecode import LAYER
from vllm_forge.images.layer import LayerBlob, members
from vllm_forge.images.layout import Image, ImageLayer, read_image
from vllm_forge.images.prewarm import prewarm_lock, unpack_prewarm
from vllm_forge.images.record import differences
from vllm_forge.project import Project
from vllm_forge.release.errors import CommitMissingError, RebuildDiffersError
from vllm_forge.release.published import Published, work_folder
from vllm_forge.release.statements import External, Provenance

SHOWN = 20  # files of a layer
PREWARM = "compiled kernels"


def rebuild(
    project: Project, published: Published, provenance: Provenance, runner: Runner
) -> list[str]:
    """Build in a temporary clone; return what could not be compared.

    Raises:
        CommitMissingError: the checkout does not have the commit.
        RebuildDiffersError: it gives another image; layers and files that differ are listed.
        CommandFailedError: it does not build.
    """
    require_commit(project.root, provenance.commit)
    with work_folder() as work:
        clone, output = work / "clone", work / "dist"
        runner.run(["git", "clone", "--quiet", "--no-checkout", str(project.root), str(clone)])
        runner.run(["git", "-C", str(clone), "checkout", "--quiet", provenance.commit])
        external = provenance.definition.external
        flags = [f"--base={external.options.base}", f"--engine={external.options.engine}"]
        flags += ["--kernels"] if external.options.kernels else []
        flags += prewarm_option(published, external, Project(clone), work)
        runner.run(
            [
                sys.executable, "-m", "vllm_forge", "build", external.sku,
                "--line", external.line, "--output", str(output), *flags,
            ],
            env={"PYTHONPATH": str(clone / "src"), "VLLM_FORGE_ROOT": str(clone)},
        )  # fmt: skip
        (layout,) = (path for path in output.iterdir() if path.is_dir())
        return compare(published, read_image(layout), work)


def prewarm_option(
    published: Published, external: External, project: Project, work: Path
) -> list[str]:
    """Bring the image's own compiled kernels to the build, if its commit has their hash."""
    _, lock = prewarm_lock(project.root, project.cell(external.sku, external.line))
    if lock is None or lock.sha256 != external.options.prewarm:
        return []
    folder = work / "prewarm"
    (layer,) = published.fetch(published.image.layers[-1:], work)
    unpack_prewarm(layer.blob, folder)  # of another hash, stack.json differs, and so the image
    return [f"--prewarm={folder}"]


def require_commit(root: Path, commit: str) -> None:
    if git(root, "cat-file", "-e", f"{commit}^{{commit}}") is None:
        what = f"commit {commit}, which the provenance names, is not in this checkout"
        remedy = "run in a checkout of the project, after: git fetch --all"
        raise CommitMissingError(what, where=root, remedy=remedy)


def compare(published: Published, built: Image, work: Path) -> list[str]:
    """Nothing, if the digests are equal; else what was not compared, or RebuildDiffersError."""
    if published.digest == f"sha256:{built.digest}":
        return []
    rows, skipped = [], []
    layers = list(published.image.layers)
    more = [layer.name for layer in layers[len(built.layers) :]]
    if more in ([PREWARM], [LAYER, PREWARM]):
        del layers[-len(more) :]
        skipped = [f"layer not rebuilt: {name}; the commit has no lock of kernels" for name in more]
    if len(layers) != len(built.layers):
        rows.append(f"{len(layers)} layers are published, {len(built.layers)} were built")
    for published_layer, built_layer in zip(layers, built.layers, strict=False):
        if published_layer.blob.digest != built_layer.blob.digest:  # a diff_id is only said
            rows += _differing_files(published, published_layer, built_layer, work)
    if not rows and not skipped:
        config = differences(published.image.config["config"], built.config["config"])
        rows = [f"configuration: {row}" for row in config]
    if rows:
        what = f"the commit gives sha256:{built.digest} here:\n  " + "\n  ".join(rows)
        remedy = "ask who released it to build it again; do not use it until the digests agree"
        raise RebuildDiffersError(what, where=published.where, remedy=remedy)
    return skipped


def _differing_files(
    published: Published, theirs: ImageLayer, ours: ImageLayer, work: Path
) -> Iterator[str]:
    yield f"layer {theirs.name}: sha256:{theirs.blob.digest}, here sha256:{ours.blob.digest}"
    (fetched,) = published.fetch([theirs], work)
    before = _files(fetched.blob)
    rows = differences(before, _files(ours.blob))
    yield from (f"  {row}" for row in shortened(rows, SHOWN))


def _files(blob: LayerBlob) -> dict[str, str]:
    """Path -> all that a layer says of it."""
    rows = {}
    for path, info, tar in members(blob):
        file = tar.extractfile(info) if info.isreg() else None
        digest = info.linkname
        if file is not None:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        kind, owner = info.type.decode(errors="replace"), f"{info.uid}:{info.gid}"
        rows[path] = f"{kind} {info.mode:o} {owner} {info.mtime:.0f} {digest}"
    return rows
