"""Images copied to a folder; with skopeo, tests/image/test_registry.py copies them elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.registry_client import NAME, bundle_of, push_image, small_layout
from tests.support.registry_server import RegistryServer
from vllm_forge.errors import UsageError
from vllm_forge.host import Runner
from vllm_forge.host.errors import DiskSpaceError
from vllm_forge.images import read_image, verify
from vllm_forge.images.errors import LayoutError
from vllm_forge.images.layout import MANIFEST
from vllm_forge.release.errors import (
    BundleFileError,
    MirrorError,
    RegistryContentError,
    RegistryUnreachableError,
)
from vllm_forge.release.mirror import bundles_of, mirror
from vllm_forge.release.referrers import attach, put_referrer
from vllm_forge.release.registry import DOCKER, INDEX, Reference, Repository
from vllm_forge.signing.errors import BundleError

PROVENANCE, SBOM = "https://slsa.dev/provenance/v1", "https://cyclonedx.org/bom"
LAYERS = [bytes([number]) * (2 << 20) for number in range(4)]


@pytest.fixture
def source(registry: RegistryServer, repository: Repository) -> Reference:
    """An image with two bundles in a registry."""
    digest = push_image(repository, "1.0", layers=LAYERS)
    for kind in (PROVENANCE, SBOM):
        attach(repository, repository.manifest(digest), bundle_of(digest, kind), kind)
    return Reference.parse(f"{registry.host}/{NAME}:1.0")


def download(source: Reference, target: Path) -> str:
    return mirror(source, target, Runner())


def test_image_and_bundles_are_copied_to_a_folder(source: Reference, tmp_path: Path) -> None:
    target = tmp_path / "usb" / "vllm"
    digest = download(source, target)
    image = read_image(target)
    verify(image)
    assert f"sha256:{image.digest}" == digest == Repository(source).resolve("1.0")
    bundles = bundles_of(target)
    assert set(bundles.values()) == {bundle_of(digest, kind) for kind in (PROVENANCE, SBOM)}
    names = sorted(path.name for path in bundles)
    assert names == ["provenance.sigstore.json", "sbom.sigstore.json"]
    assert sorted(path.name for path in target.parent.iterdir()) == ["vllm", "vllm.attest"]
    assert download(source, target) == digest
    assert bundles_of(target) == bundles


@pytest.mark.parametrize("name", [".", "../vllm", "../link"])
def test_folder_by_another_name_has_its_bundles(
    source: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    digest = download(source, tmp_path / "vllm")
    (tmp_path / "link").symlink_to(tmp_path / "vllm")
    monkeypatch.chdir(tmp_path / "vllm")
    assert len(bundles_of(Path(name))) == 2
    assert download(source, Path(name)) == digest


def test_what_is_attached_later_is_added(
    source: Reference, repository: Repository, tmp_path: Path
) -> None:
    target = tmp_path / "vllm"
    digest = download(source, target)
    own = target.with_name("vllm.attest") / "own.sigstore.json"
    own.write_bytes(bundle_of(digest, "https://example.com/own"))
    for kind in ("https://example.com/own", "https://example.com/Later/../x?y"):
        attach(repository, repository.manifest(digest), bundle_of(digest, kind), kind)
    download(source, target)
    names = {path.name for path in bundles_of(target)}
    kinds = ("bundle", "own", "provenance", "sbom")
    assert names == {f"{kind}.sigstore.json" for kind in kinds}


def test_killed_copy_goes_on_where_it_stopped(
    registry: RegistryServer, source: Reference, root: Path, tmp_path: Path
) -> None:
    target = tmp_path / "vllm"
    program = (
        "import pathlib, sys\n"
        "from vllm_forge.host import Runner\n"
        "from vllm_forge.release.mirror import mirror\n"
        "from vllm_forge.release.registry import Reference\n"
        "from vllm_forge.sources import fetch\n"
        "fetch.PARALLEL = 1\n"
        "mirror(Reference.parse(sys.argv[1]), pathlib.Path(sys.argv[2]), Runner())\n"
    )
    layers = {digest for digest, content in registry.blobs.items() if len(content) == 2 << 20}
    running: list[subprocess.Popen[bytes]] = []
    asked_before_kill: list[str] = []

    def kill() -> None:
        asked_before_kill.extend(row.path for row in registry.asked("GET", ".*/blobs/.*"))
        os.kill(running[0].pid, signal.SIGKILL)
        running[0].wait()

    last = sorted(layers)[-1]
    registry.plant("GET", f".*/blobs/{last}", before=kill)
    command = [sys.executable, "-c", program, str(source), str(target)]
    env = os.environ | {"PYTHONPATH": str(root / "src")}
    with subprocess.Popen(command, env=env) as process:
        running.append(process)
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    finished = {path.rpartition("/")[2] for path in asked_before_kill} & layers
    before = len(registry.requests)
    download(source, target)
    verify(read_image(target))
    again = {row.path.rpartition("/")[2] for row in registry.requests[before:]}
    assert last in again
    assert not finished & again
    assert {path.name for path in tmp_path.glob("vllm*")} == {"vllm", "vllm.attest"}


def test_rest_of_another_image_is_not_taken(
    registry: RegistryServer, source: Reference, repository: Repository, tmp_path: Path
) -> None:
    target = tmp_path / "vllm"
    last = sorted(digest for digest, blob in registry.blobs.items() if len(blob) == 2 << 20)[-1]
    registry.plant("GET", f".*/blobs/{last}", status=404, times=-1)
    with pytest.raises(RegistryContentError):
        download(source, target)
    assert not target.exists()
    digest = push_image(repository, "1.0", label="second", layers=[b"other"])
    assert download(source, target) == digest
    assert len(list((target / "blobs" / "sha256").iterdir())) == 3


def test_registry_that_goes_down_leaves_no_layout(
    registry: RegistryServer, source: Reference, tmp_path: Path
) -> None:
    registry.plant("GET", ".*/blobs/.*", status=500, times=-1)
    with pytest.raises(RegistryUnreachableError):
        download(source, tmp_path / "vllm")
    assert not (tmp_path / "vllm").exists()
    registry.faults.clear()
    download(source, tmp_path / "vllm")


def test_full_disk_is_reported_before_the_first_byte(
    registry: RegistryServer,
    source: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm_forge.host.files.free_bytes", lambda _: 1 << 20)
    with pytest.raises(DiskSpaceError):
        download(source, tmp_path / "vllm")
    large = {digest for digest, content in registry.blobs.items() if len(content) == 2 << 20}
    assert not [row for row in registry.requests if row.path.rpartition("/")[2] in large
                and row.method == "GET"]  # fmt: skip


def test_disk_must_hold_only_what_is_missing(
    registry: RegistryServer, source: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = sorted(digest for digest, blob in registry.blobs.items() if len(blob) == 2 << 20)[-1]
    registry.plant("GET", f".*/blobs/{last}", status=404)
    with pytest.raises(RegistryContentError):
        download(source, tmp_path / "vllm")
    monkeypatch.setattr("vllm_forge.host.files.free_bytes", lambda _: 7 << 20)
    download(source, tmp_path / "vllm")


def test_damaged_folder_is_not_pushed(tmp_path: Path) -> None:
    image = small_layout(tmp_path / "vllm")
    blob = image.layers[0].blob.path
    blob.unlink()
    blob.write_bytes(bytes(image.layers[0].blob.size))
    with pytest.raises(LayoutError, match="has sha256"):
        mirror(tmp_path / "vllm", Reference.parse("registry.example/x:1"), Runner())


def test_folder_of_another_image_is_kept(source: Reference, tmp_path: Path) -> None:
    image = small_layout(tmp_path / "vllm")
    with pytest.raises(MirrorError, match="the folder holds another image"):
        download(source, tmp_path / "vllm")
    verify(image)


def test_damaged_copy_is_reported(source: Reference, tmp_path: Path) -> None:
    target = tmp_path / "vllm"
    download(source, target)
    blob = max((target / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob.chmod(0o644)
    blob.write_bytes(b"x" * blob.stat().st_size)
    with pytest.raises(LayoutError):
        download(source, target)


@pytest.mark.parametrize("media_type", [INDEX, f"{DOCKER}.v2+json"])
def test_what_is_not_an_oci_image_is_refused(
    media_type: str,
    registry: RegistryServer,
    source: Reference,
    repository: Repository,
    tmp_path: Path,
) -> None:
    document = json.loads(repository.manifest("1.0").content) | {"mediaType": media_type}
    if media_type == INDEX:
        document = {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}
    registry.put(NAME, json.dumps(document).encode(), media_type, "other")
    with pytest.raises(MirrorError, match="is not an OCI image"):
        download(Reference.parse(f"{source.registry}/{NAME}:other"), tmp_path / "vllm")


def test_what_is_not_a_bundle_is_counted(
    source: Reference, repository: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = repository.resolve("1.0")
    manifest = json.loads(repository.manifest("1.0").content)
    manifest["subject"] = {"mediaType": MANIFEST, "digest": digest, "size": 1}
    put_referrer(repository, json.dumps(manifest).encode())
    download(source, tmp_path / "vllm")
    assert "2 bundles" in (said := capsys.readouterr().err)
    assert "1 attached manifests are not bundles" in said


def test_link_among_the_bundles_is_refused(source: Reference, tmp_path: Path) -> None:
    target = tmp_path / "vllm"
    download(source, target)
    (tmp_path / "vllm.attest" / "x.sigstore.json").symlink_to("/etc/passwd")
    with pytest.raises(BundleFileError, match="not a plain file"):
        bundles_of(target)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("h.example/x", "folder", "expected a tag or a digest"),
        ("folder", "other", "cannot mirror a folder to a folder"),
        ("h.example/x:1", f"h.example/y@sha256:{'0' * 64}", "expected a name"),
    ],
)
def test_impossible_copies_are_refused(source: str, target: str, message: str) -> None:
    places = [Reference.parse(text) if "/" in text else Path(text) for text in (source, target)]
    with pytest.raises(UsageError, match=message):
        mirror(places[0], places[1], Runner())


def test_file_that_is_not_a_bundle_is_refused_before_the_push(tmp_path: Path) -> None:
    small_layout(tmp_path / "vllm")
    (tmp_path / "vllm.attest").mkdir()
    bundle = json.loads(bundle_of(f"sha256:{'0' * 64}", SBOM))
    bundle["dsseEnvelope"]["payload"] = "e30="
    path = tmp_path / "vllm.attest" / "x.sigstore.json"
    path.write_text(json.dumps(bundle))
    with pytest.raises(BundleError, match="its payload is not a statement of type"):
        mirror(tmp_path / "vllm", Reference.parse("registry.example/x:1"), Runner())
