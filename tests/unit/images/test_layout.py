"""OCI layouts: written whole, read back, and every damage is a LayoutError."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from vllm_forge.host.files import file_digest
from vllm_forge.images.engines import Buildx
from vllm_forge.images.errors import LayoutError
from vllm_forge.images.layout import (
    Image,
    ImageLayer,
    has_name,
    read_image,
    set_name,
    verify,
    write_image,
)
from vllm_forge.images.rootfs import compress
from vllm_forge.images.store import write_layer
from vllm_forge.images.wheels import Entry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EPOCH = 1735689600
NAME = "localhost/vllm:1.0-b300"
CONFIG = {"Env": ["A=1"], "User": "1000:1000", "Entrypoint": ["/bin/x"], "Labels": {"b": "2"}}


@pytest.fixture
def layers() -> list[ImageLayer]:
    made = []
    for name in ("lower", "upper"):
        entries = [Entry(path=f"{name}/file", content=name.encode() * 500)]
        made.append(ImageLayer(blob=write_layer(name, entries, EPOCH).blob, name=name))
    return made


def write(target: Path, layers: list[ImageLayer]) -> Image:
    return write_image(target, layers=layers, config=CONFIG, epoch=EPOCH, name=NAME)


@pytest.fixture
def image(tmp_path: Path, layers: list[ImageLayer]) -> Image:
    return write(tmp_path / "dist" / "image", layers)


def test_compress_does_not_write_into_a_linked_blob(tmp_path: Path) -> None:
    tar, target, published = (tmp_path / name for name in ("x.tar", "x.tar.gz", "published"))
    tar.write_bytes(b"first" * 1000)
    compress(tar, target)
    os.link(target, published)
    first = published.read_bytes()
    tar.write_bytes(b"second")
    blob = compress(tar, target)
    assert published.read_bytes() == first
    assert file_digest(target) == blob.digest
    assert not target.stat().st_mode & 0o222


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def test_written_layout_is_read_back(image: Image) -> None:
    assert read_image(image.path) == image
    verify(read_image(image.path))


def test_layout_follows_the_image_spec(image: Image, layers: list[ImageLayer]) -> None:
    assert load(image.path / "oci-layout") == {"imageLayoutVersion": "1.0.0"}
    index = load(image.path / "index.json")
    assert index["schemaVersion"] == 2
    (entry,) = index["manifests"]
    manifest_path = image.blob(entry["digest"])
    assert entry["size"] == manifest_path.stat().st_size
    assert entry["annotations"] == {
        "org.opencontainers.image.ref.name": "1.0-b300",
        "io.containerd.image.name": NAME,
    }
    assert entry["platform"] == {"architecture": "amd64", "os": "linux"}
    manifest = load(manifest_path)
    assert manifest["mediaType"] == entry["mediaType"]
    assert [layer["digest"] for layer in manifest["layers"]] == [
        f"sha256:{layer.blob.digest}" for layer in layers
    ]
    config_path = image.blob(manifest["config"]["digest"])
    assert manifest["config"]["size"] == config_path.stat().st_size
    config = load(config_path)
    assert config["config"] == CONFIG
    assert config["created"] == "2025-01-01T00:00:00Z"
    assert config["rootfs"]["diff_ids"] == [f"sha256:{layer.blob.diff_id}" for layer in layers]
    assert [item["created_by"] for item in config["history"]] == [
        "vllm-forge: lower",
        "vllm-forge: upper",
    ]
    for path in (image.path / "blobs" / "sha256").iterdir():
        assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    assert image.size == config_path.stat().st_size + sum(layer.blob.size for layer in layers)


def test_same_layers_same_digest(image: Image, layers: list[ImageLayer], tmp_path: Path) -> None:
    assert write(tmp_path / "again", layers).digest == image.digest
    assert write(tmp_path / "swapped", layers[::-1]).digest != image.digest


def test_another_name_is_the_same_image(image: Image) -> None:
    assert has_name(image, NAME)
    set_name(image.path, image.digest, "localhost/other:2.0")
    assert has_name(image, "localhost/other:2.0")
    assert not has_name(image, NAME)
    assert read_image(image.path) == image
    (entry,) = load(image.path / "index.json")["manifests"]
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == "2.0"
    verify(read_image(image.path))


def test_no_blob_is_left_over_from_the_layout_before(
    image: Image, layers: list[ImageLayer]
) -> None:
    (image.path / "stale").touch()
    write(image.path, layers[:1])
    assert not (image.path / "stale").exists()
    assert len(list((image.path / "blobs" / "sha256").iterdir())) == 3
    verify(read_image(image.path))
    assert [path.name for path in image.path.parent.iterdir()] == [image.path.name]


def test_equal_layers_share_a_blob(layers: list[ImageLayer], tmp_path: Path) -> None:
    made = write(tmp_path / "twice", [layers[0], layers[0]])
    assert len(made.manifest["layers"]) == 2
    verify(read_image(made.path))


def test_other_file_system(
    layers: list[ImageLayer], image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    made = write(tmp_path / "copied", layers)
    assert made.digest == image.digest
    verify(read_image(made.path))


def test_failed_write_keeps_the_layout_that_is_there(
    image: Image, layers: list[ImageLayer]
) -> None:
    layers[1].blob.path.unlink()
    with pytest.raises(OSError, match="No such file"):
        write(image.path, layers)
    assert read_image(image.path) == image
    verify(image)
    assert [path.name for path in image.path.parent.iterdir()] == [image.path.name]


def blob_paths(image: Image) -> dict[str, Path]:
    return {
        "layer": image.blob(image.manifest["layers"][1]["digest"]),
        "config": image.blob(image.manifest["config"]["digest"]),
        "manifest": image.blob(image.digest),
    }


def replace(path: Path, content: bytes) -> None:
    """As another program would: a new file, not the layer store's, which it is a link to."""
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("which", ["layer", "config", "manifest"])
def test_tampered_blob_is_rejected(which: str, image: Image) -> None:
    path = blob_paths(image)[which]
    content = bytearray(path.read_bytes())
    at = content.index(b"amd64") if which == "config" else len(content) // 2
    if which == "manifest":
        at = content.index(b"schemaVersion")
    content[at] ^= 1
    replace(path, bytes(content))
    with pytest.raises(LayoutError, match=path.name):
        verify(image)


@pytest.mark.parametrize("which", ["layer", "config", "manifest"])
def test_missing_blob_is_rejected(which: str, image: Image) -> None:
    path = blob_paths(image)[which]
    path.unlink()
    with pytest.raises(LayoutError):
        read_image(image.path)
    with pytest.raises(LayoutError, match=path.name):
        verify(image)


@pytest.mark.parametrize("which", ["layer", "config", "manifest"])
def test_truncated_blob_is_rejected(which: str, image: Image) -> None:
    path = blob_paths(image)[which]
    replace(path, path.read_bytes()[:-7])
    with pytest.raises(LayoutError):
        read_image(image.path)
    with pytest.raises(LayoutError, match=path.name):
        verify(image)


def index(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "index.json"
        file.write_text(json.dumps(change(load(file))))

    return edit


LAYOUTS: dict[str, Callable[[Path], object]] = {
    "no index": lambda path: (path / "index.json").unlink(),
    "index is not JSON": lambda path: (path / "index.json").write_text("{"),
    "index is not UTF-8": lambda path: (path / "index.json").write_bytes(b'{"a": "\xff"}'),
    "index is a list": index(lambda data: [data]),
    "no image": index(lambda data: data | {"manifests": []}),
    "two images": index(lambda data: data | {"manifests": data["manifests"] * 2}),
    "no manifests": index(lambda _: {"schemaVersion": 2}),
    "manifests is a number": index(lambda data: data | {"manifests": 3}),
    "no digest": index(lambda data: data | {"manifests": [{}]}),
    "digest is a number": index(lambda data: data | {"manifests": [{"digest": 3}]}),
    "other digest": index(lambda data: data | {"manifests": [{"digest": "sha256:" + "0" * 64}]}),
    "an index of indexes": index(
        lambda data: data | {"manifests": [data["manifests"][0] | {"digest": "sha256:../.."}]}
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_broken_layout_is_rejected(name: str, image: Image) -> None:
    LAYOUTS[name](image.path)
    with pytest.raises(LayoutError) as refused:
        read_image(image.path)
    assert str(image.path) in str(refused.value)


def test_digest_that_leads_to_another_file_is_rejected(image: Image) -> None:
    """A remote builder's manifest is its own; its layers are files of the layout."""
    outside = image.path.parent / "outside"
    outside.write_bytes(b"of this host")
    row = {"digest": "sha256:../../../outside", "size": 12}
    content = json.dumps({**image.manifest, "layers": [row]}).encode()
    digest = hashlib.sha256(content).hexdigest()
    (image.path / "blobs" / "sha256" / digest).write_bytes(content)
    index = {"manifests": [{"digest": f"sha256:{digest}"}]}
    (image.path / "index.json").unlink()
    (image.path / "index.json").write_text(json.dumps(index))
    with pytest.raises(LayoutError, match="invalid digest"):
        read_image(image.path)


def test_missing_layout_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(LayoutError):
        read_image(tmp_path / "none")


def test_docker_output_is_read_as_plain_tars(tmp_path: Path, layers: list[ImageLayer]) -> None:
    """As buildx exports it: one image of plain tars."""
    plain = "application/vnd.oci.image.layer.v1.tar"
    tars = [
        dataclasses.replace(row, blob=dataclasses.replace(row.blob, media_type=plain))
        for row in layers
    ]
    write(tmp_path / "image", tars)
    output = Buildx().system_output(tmp_path)
    assert [file_digest(tar) for tar in output.tars] == [row.blob.digest for row in layers]
    assert output.diff_ids == tuple(row.blob.diff_id for row in layers)
    assert (output.config, output.root) == (CONFIG, None)
    write(tmp_path / "image", layers)
    with pytest.raises(LayoutError, match="buildx left a compressed layer"):
        Buildx().system_output(tmp_path)
