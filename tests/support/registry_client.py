"""What tests of registries need: a login, small images, a bundle."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.registry_server import digest_of
from vllm_forge.host import canonical
from vllm_forge.images.layer import LayerBlob
from vllm_forge.images.layout import CONFIG, MANIFEST, Image, ImageLayer, write_image
from vllm_forge.release.registry import Repository
from vllm_forge.signing.bundle import MEDIA_TYPE, PAYLOAD_TYPE, Statement, Subject
from vllm_forge.sources import index

NAME = "forge/vllm"
LOGIN = ("robot", "s3cret")


def empty_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a stored login or a proxy; requests are repeated at once."""
    for name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder / "run"))
    monkeypatch.setattr(index, "BACKOFF_S", 0)
    return folder


def push_image(
    repository: Repository, tag: str | None = None, label: str = "", layers: Sequence[bytes] = ()
) -> str:
    """Push an image whose layers are not unpacked by anybody; returns its digest."""
    config = canonical({"architecture": "amd64", "os": "linux", "label": label})
    rows = [(CONFIG, config), *(("application/octet-stream", layer) for layer in layers)]
    for _, content in rows:
        repository.put_blob(content)
    config_row, *layer_rows = (
        {"mediaType": kind, "digest": digest_of(content), "size": len(content)}
        for kind, content in rows
    )
    manifest = {"schemaVersion": 2, "config": config_row, "layers": layer_rows}
    return repository.put_manifest(canonical(manifest | {"mediaType": MANIFEST}), MANIFEST, tag)


def small_layout(target: Path, count: int = 2, size: int = 1 << 20) -> Image:
    """An OCI layout whose layers are real; each has one file of incompressible bytes."""
    layers, scratch = [], target.with_name(f"{target.name}.layers")
    scratch.mkdir(parents=True)
    for number in range(count):
        content = random.Random(number).randbytes(size)  # noqa: S311
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as archive:
            member = tarfile.TarInfo(f"file{number}")
            member.size = size
            archive.addfile(member, io.BytesIO(content))
        packed = gzip.compress(tar.getvalue(), compresslevel=1, mtime=0)
        path = scratch / str(number)
        path.write_bytes(packed)
        blob = LayerBlob(
            path=path,
            digest=hashlib.sha256(packed).hexdigest(),
            diff_id=hashlib.sha256(tar.getvalue()).hexdigest(),
            size=len(packed),
        )
        layers.append(ImageLayer(blob=blob, name=f"layer {number}"))
    return write_image(
        target, layers=layers, config={"Env": ["A=1"]}, epoch=1735689600, name="forge/vllm:1.0"
    )


def bundle_of(digest: str, predicate_type: str) -> bytes:
    """A bundle about a manifest whose signature is by nobody."""
    statement = Statement(
        subject=(Subject(name="image", digest={"sha256": digest.removeprefix("sha256:")}),),
        predicate_type=predicate_type,
        predicate={},
    )
    envelope = {
        "payload": base64.b64encode(statement.content).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"sig": base64.b64encode(b"nobody").decode()}],
    }
    material = {"publicKey": {"hint": "nobody"}}
    return canonical(
        {"mediaType": MEDIA_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope}
    )


def store_login(file: Path, host: str, login: tuple[str, str] = LOGIN) -> None:
    """Write a file of logins as ``skopeo login`` does."""
    auth = base64.b64encode(":".join(login).encode()).decode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
