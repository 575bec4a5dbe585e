"""Two builds of one commit that differ: the layer and the files are listed."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.support.built import Built, built_image
from tests.support.fast_build import fast_build, use
from tests.support.project import PATCHED
from vllm_forge.host.files import write_json
from vllm_forge.images.layout import ImageLayer, write_image
from vllm_forge.images.prewarm import Prewarm, prewarm_layer, prewarm_lock, tree_digest
from vllm_forge.project import Project
from vllm_forge.release.errors import CommitMissingError, RebuildDiffersError
from vllm_forge.release.published import from_layout
from vllm_forge.release.rebuild import compare, prewarm_option, require_commit
from vllm_forge.release.statements import BuildOptions, External

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vllm_forge.images.layout import Image

pytestmark = pytest.mark.xdist_group("rebuild")  # one worker builds what its fixtures have

EPOCH = 1735689600


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    with built_image(tmp_path_factory.mktemp("built")) as built:
        yield built


def again(built: Built, folder: Path, layers: tuple[ImageLayer, ...], **config: str) -> Image:
    """The image with other layers or configuration."""
    changed = built.image.config["config"] | config
    return write_image(folder, layers=layers, config=changed, epoch=EPOCH, name="x:y")


def test_equal_digests_are_equal(built: Built, tmp_path: Path) -> None:
    assert compare(from_layout(built.image.path), built.image, tmp_path) == []


def test_differing_file_is_listed(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = built.mini.copy(tmp_path / "other")
    other.patch("bool(args and not args.dynamic)")
    use(other, monkeypatch)
    image, _ = fast_build(other, "alpha")
    with pytest.raises(RebuildDiffersError) as refused:
        compare(from_layout(built.image.path), image, tmp_path)
    text = str(refused.value)
    assert f"the commit gives sha256:{image.digest} here" in text
    assert "layer patches/vllm/mini: sha256:" in text
    assert f"changed opt/venv/lib/python3.13/site-packages/{PATCHED}: " in text
    assert "layer docker/Dockerfile" not in text


def test_differing_configuration_is_listed(built: Built, tmp_path: Path) -> None:
    image = again(built, tmp_path / "x", built.image.layers, User="0:0")
    with pytest.raises(RebuildDiffersError, match="configuration: changed User: 10001:0 -> 0:0"):
        compare(from_layout(built.image.path), image, tmp_path)


def test_lost_layer_is_counted(built: Built, tmp_path: Path) -> None:
    image = again(built, tmp_path / "x", built.image.layers[:-1])
    count = len(built.image.layers)
    with pytest.raises(
        RebuildDiffersError, match=f"{count} layers are published, {count - 1} were"
    ):
        compare(from_layout(built.image.path), image, tmp_path)


def test_layer_of_compiled_kernels_is_not_compared(built: Built, tmp_path: Path) -> None:
    *_, last = built.image.layers
    kernels = ImageLayer(blob=last.blob, name="compiled kernels")
    published = again(built, tmp_path / "x", (*built.image.layers, kernels))
    assert compare(from_layout(published.path), built.image, tmp_path) == [
        "layer not rebuilt: compiled kernels; the commit has no lock of kernels"
    ]


def baked(built: Built, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """The image with a layer of one compiled kernel, and the hash of the set."""
    use(built.mini, monkeypatch)
    kernels = folder / "kernels"
    kernels.mkdir()
    (kernels / "k.cubin").write_bytes(b"code")
    prewarm = Prewarm(folder=kernels, key={}, digest=tree_digest(kernels))
    layer = ImageLayer(blob=prewarm_layer(prewarm, EPOCH).blob, name="compiled kernels")
    return again(built, folder / "x", (*built.image.layers, layer)).path, prewarm.digest


@pytest.mark.parametrize("lock", ["same", "other", "none"])
def test_locked_kernels_are_built_in_again(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    path, digest = baked(built, tmp_path, monkeypatch)
    project = Project(built.mini.copy(tmp_path / "clone").root)
    if lock != "none":
        locked = {"same": digest, "other": "7" * 64}[lock]
        write_json(
            prewarm_lock(project.root, built.cell)[0],
            {"sha256": locked, "bytes": 4, "key": {}, "image": "sha256:1", "tiers": []},
        )
    options = BuildOptions(base="locked", engine="buildah", prewarm=digest)
    external = External(sku="alpha", line=built.cell.line_name, options=options)
    option = prewarm_option(from_layout(path), external, project, tmp_path)
    assert option == ([f"--prewarm={tmp_path / 'prewarm'}"] if lock == "same" else [])
    if option:
        assert tree_digest(tmp_path / "prewarm") == digest


@pytest.mark.parametrize("kernels", [False, True])
def test_layer_of_other_bytes_is_not_taken_for_equal(
    built: Built, tmp_path: Path, *, kernels: bool
) -> None:
    """Its ``diff_id`` is what the published configuration says: that of the layer built here."""
    first, *others = built.image.layers
    evil = tmp_path / "evil.tar.gz"
    evil.write_bytes(gzip.compress(bytes(10240)))
    digest = hashlib.sha256(evil.read_bytes()).hexdigest()
    blob = replace(first.blob, path=evil, digest=digest, size=evil.stat().st_size)
    layers = [ImageLayer(blob=blob, name=first.name), *others]
    layers += [ImageLayer(blob=others[-1].blob, name="compiled kernels")] if kernels else []
    published = again(built, tmp_path / "x", tuple(layers))
    with pytest.raises(RebuildDiffersError, match=f"layer rootfs: sha256:{digest}"):
        compare(from_layout(published.path), built.image, tmp_path)


def test_commit_that_is_not_here_is_refused(built: Built) -> None:
    with pytest.raises(CommitMissingError, match="which the provenance names, is not in this"):
        require_commit(built.mini.root, "0" * 40)
