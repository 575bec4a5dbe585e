"""Two builds of one commit that differ: the layer and the files are listed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.built import Built, built_image
from tests.support.fast_build import fast_build, use
from tests.support.project import PATCHED
from vllm_forge.images.layout import ImageLayer, write_image
from vllm_forge.release.errors import CommitMissingError, RebuildDiffersError
from vllm_forge.release.published import from_layout
from vllm_forge.release.rebuild import compare, require_commit

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
        "layer not rebuilt: compiled kernels, whose set of kernels is not here"
    ]


def test_commit_that_is_not_here_is_refused(built: Built) -> None:
    with pytest.raises(CommitMissingError, match="which the provenance names, is not in this"):
        require_commit(built.mini.root, "0" * 40)
