"""Our bundles by the verifiers of others: accepted as they are, refused after any change.

Needed: cosign 3 on PATH, from the .deb of Debian forky, which runs on Debian 12; and node with
NODE_PATH naming a node_modules that has @sigstore/verify and @sigstore/bundle.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.keys import key_pair
from tests.support.registry_client import push_image
from tests.support.registry_server import RegistryServer
from vllm_forge.release.referrers import attach
from vllm_forge.release.registry import Reference, Repository
from vllm_forge.release.statements import PROVENANCE
from vllm_forge.signing import load_private, sign
from vllm_forge.signing.bundle import Statement, Subject

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tests/support/verify_bundle.cjs"
IMAGE = b"the manifest of an image\n"
HOW = {
    "cosign": "no cosign: put that of Debian forky's cosign_3*.deb on PATH",
    "oras": "no oras: put that of Debian forky's oras_1*.deb on PATH",
    "skopeo": "no skopeo: apt-get install skopeo",
    "node": "no @sigstore/verify: npm install @sigstore/verify @sigstore/bundle, and set NODE_PATH "
    "to its node_modules",
}


def run(tmp_path: Path, *argv: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HOME": str(tmp_path), "COSIGN_PASSWORD": ""}
    words = [str(word) for word in argv]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


def require(tool: str) -> None:
    missing = shutil.which(tool) is None
    if tool == "node" and not missing:
        probe = ["node", "-e", "require('@sigstore/verify'); require('@sigstore/bundle')"]
        missing = subprocess.run(probe, capture_output=True, check=False).returncode != 0
    if missing:
        pytest.skip(HOW[tool])


@pytest.fixture(params=["cosign", "node"])
def accepts(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[bytes, Path], bool]:
    """Whether another verifier accepts a bundle of ``IMAGE`` that this public key signed."""
    require(request.param)
    bundle, image = tmp_path / "bundle.json", tmp_path / "image"
    image.write_bytes(IMAGE)

    def verify(content: bytes, key: Path) -> bool:
        bundle.write_bytes(content)
        if request.param == "node":
            done = run(tmp_path, "node", SCRIPT, bundle, key)
        else:
            done = run(
                tmp_path, "cosign", "verify-blob-attestation", "--insecure-ignore-tlog=true",
                "--key", key, "--bundle", bundle, "--type", "slsaprovenance1", image,
            )  # fmt: skip
        return done.returncode == 0

    return verify


def statement(image: bytes = IMAGE) -> Statement:
    subject = Subject(name="image", digest={"sha256": hashlib.sha256(image).hexdigest()})
    return Statement(subject=(subject,), predicate_type=PROVENANCE, predicate={"x": 1})


@pytest.mark.parametrize("kind", ["p256", "ed25519"])
def test_others_accept_our_bundles(
    accepts: Callable[[bytes, Path], bool], tmp_path: Path, kind: str
) -> None:
    private, public = key_pair(tmp_path, kind)
    assert accepts(sign(statement().content, load_private(private)), public)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "payload": lambda envelope: envelope.update(
        payload=base64.b64encode(statement(b"other").content).decode()
    ),
    "signature": lambda envelope: envelope["signatures"][0].update(
        sig=base64.b64encode(b"\x30" + bytes(70)).decode()
    ),
    "no signature": lambda envelope: envelope.update(signatures=[]),
    "payload type": lambda envelope: envelope.update(payloadType="text/plain"),
}


@pytest.mark.parametrize("kind", ["p256", "ed25519"])
@pytest.mark.parametrize("change", CHANGES)
def test_others_refuse_changed_bundles(
    accepts: Callable[[bytes, Path], bool], tmp_path: Path, kind: str, change: str
) -> None:
    private, public = key_pair(tmp_path, kind)
    document = json.loads(sign(statement().content, load_private(private)))
    CHANGES[change](document["dsseEnvelope"])
    assert not accepts(json.dumps(document).encode(), public)


def test_others_refuse_another_key(accepts: Callable[[bytes, Path], bool], tmp_path: Path) -> None:
    private, _ = key_pair(tmp_path / "ours", "p256")
    _, public = key_pair(tmp_path / "theirs", "p256")
    assert not accepts(sign(statement().content, load_private(private)), public)


@pytest.mark.parametrize("referrers_api", [True, False])
def test_cosign_and_oras_find_what_is_attached(tmp_path: Path, *, referrers_api: bool) -> None:
    """And cosign verifies that it is about this image."""
    require("cosign")
    require("oras")
    private, public = key_pair(tmp_path, "p256")
    key = load_private(private)
    with RegistryServer(referrers_api=referrers_api).running() as registry:
        reference = Reference.parse(f"{registry.host}/forge/vllm")
        repository = Repository(reference)
        digests = [push_image(repository, label=name) for name in ("one", "two")]
        for digest, subject in zip(digests, (digests[0], digests[0]), strict=True):
            about = Subject(name="image", digest={"sha256": subject.removeprefix("sha256:")})
            signed = Statement(subject=(about,), predicate_type=PROVENANCE, predicate={"x": 1})
            bundle = sign(signed.content, key)
            attach(repository, repository.manifest(digest), bundle, PROVENANCE)
        codes = [
            run(
                tmp_path, "cosign", "verify-attestation", "--insecure-ignore-tlog=true", "--key",
                public, "--type", "slsaprovenance1", reference.at(digest),
            ).returncode
            for digest in digests
        ]  # fmt: skip
        assert codes[0] == 0
        assert codes[1] != 0  # a statement about another image
        shown = run(tmp_path, "oras", "discover", "--plain-http", reference.at(digests[0]))
        assert "application/vnd.dev.sigstore.bundle.v0.3+json" in shown.stdout


def others() -> dict[str, str]:
    """Tool -> its command of docs/operate/verify.md, which is that of keys.md, too."""
    page = (ROOT / "docs/operate/verify.md").read_text()
    block = page.partition("## With other tools")[2].partition("```sh\n")[2].partition("```")[0]
    return {line.split()[0]: line for line in block.splitlines()}


@pytest.mark.parametrize("tool", others())
def test_documented_command_of_another_tool_runs(tmp_path: Path, tool: str) -> None:
    """Word for word; a registry without TLS must be called localhost."""
    require(tool)
    private, public = key_pair(tmp_path, "p256")
    public.rename(tmp_path / "release.pem")
    with RegistryServer(referrers_api=True).running() as registry:
        host = registry.host.replace("127.0.0.1", "localhost")
        repository = Repository(Reference.parse(f"{host}/forge/vllm"))
        digest = push_image(repository)
        about = Subject(name="image", digest={"sha256": digest.removeprefix("sha256:")})
        signed = Statement(subject=(about,), predicate_type=PROVENANCE, predicate={"x": 1})
        bundle = sign(signed.content, load_private(private))
        attach(repository, repository.manifest(digest), bundle, PROVENANCE)
        insecure = tmp_path / ".config/containers/registries.conf"  # of skopeo
        insecure.parent.mkdir(parents=True)
        insecure.write_text(f'[[registry]]\nlocation = "{host}"\ninsecure = true\n')
        environment = os.environ | {
            "IMAGE": str(repository.reference.at(digest)), "HOME": str(tmp_path),
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "-euc", others()[tool]], cwd=tmp_path, env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
