"""What tests of registries need: a login, a small image."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from tests.support.registry_server import digest_of
from vllm_forge.host import canonical
from vllm_forge.images.layout import CONFIG, MANIFEST
from vllm_forge.release.registry import Repository

NAME = "forge/vllm"
LOGIN = ("robot", "s3cret")


def push_image(repository: Repository, tag: str | None = None, label: str = "") -> str:
    """Push an image without layers; returns its digest."""
    config = canonical({"architecture": "amd64", "os": "linux", "label": label})
    repository.put_blob(config)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": digest_of(config), "size": len(config)},
        "layers": [],
    }
    return repository.put_manifest(canonical(manifest), MANIFEST, tag)


def store_login(file: Path, host: str, login: tuple[str, str] = LOGIN) -> None:
    auth = base64.b64encode(":".join(login).encode()).decode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
