"""Known vulnerabilities by exports of OSV: ranges, names, and what is not checked."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.osv import export, record, since
from vllm_forge.release import sbom
from vllm_forge.release.errors import OsvError, SbomError
from vllm_forge.release.sbom import Vulnerability, find

if TYPE_CHECKING:
    from pathlib import Path

TORCH = "pkg:pypi/torch@2.11.0%2Bcu130"
VLLM = "pkg:pypi/vllm@0.26.0%2Bforge.7c43ca5a"
SSL = "pkg:deb/debian/libssl3t64@3.5.1-1%2Bb2?arch=amd64&distro=debian-13&upstream=openssl"
CRATE = "pkg:cargo/ring@0.17.8"
COMPONENTS = [
    {"name": "torch", "purl": TORCH, "components": [{"name": "ring", "purl": CRATE}]},
    {
        "name": "vllm",
        "purl": VLLM,
        "pedigree": {"ancestors": [{"name": "vllm", "purl": "pkg:pypi/vllm@0.26.0"}]},
    },
    {"name": "libssl3t64", "purl": SSL},
    {"name": "debian"},  # an operating system has no purl
]
DOCUMENT = {"components": COMPONENTS}


@pytest.mark.parametrize(
    ("events", "affected"),
    [
        (since("0"), True),
        (since("0", fixed="2.11.1"), True),
        (since("0", fixed="2.11.0"), False),
        (since("0", last_affected="2.11.0"), True),  # which has +cu130 here
        (since("0", last_affected="2.10.1"), False),
        (since("2.11.1"), False),
        (since("2.11"), True),
        ([*since("0", fixed="2.9.0"), *since("2.10.0", fixed="2.12.0")], True),
        ([*since("2.10.0", fixed="2.10.5"), *since("0", fixed="2.9.0")], False),
        (since("no version"), True),  # cannot be compared: somebody must look
        ([], False),
    ],
)
def test_version_is_compared_with_each_range(
    tmp_path: Path, events: list[dict[str, str]], *, affected: bool
) -> None:
    known, _ = find(DOCUMENT, export(tmp_path, record("torch", *events)))
    assert [row.version for row in known] == (["2.11.0+cu130"] if affected else [])


def test_release_that_was_patched_is_looked_up(tmp_path: Path) -> None:
    row = record("vLLM", *since("0", last_affected="0.26.0"), aliases=["CVE-2026-1"])
    known, _ = find(DOCUMENT, export(tmp_path, row))
    assert known == [Vulnerability("vLLM", "0.26.0+forge.7c43ca5a", ("X-1", "CVE-2026-1"), ())]


def test_listed_version_is_affected_and_withdrawn_record_is_not_counted(tmp_path: Path) -> None:
    listed = record("torch")
    listed["affected"][0]["versions"] = ["2.11.0"]
    gone = record("torch", *since("0"), withdrawn="2026-11-01T00:00:00Z")
    known, _ = find(DOCUMENT, export(tmp_path, listed, gone))
    assert len(known) == 1


def test_packages_of_other_types_are_not_checked(tmp_path: Path) -> None:
    row = record("openssl", *since("0"), ecosystem="Debian:13")
    known, left = find(DOCUMENT, export(tmp_path, row, record("other")))
    assert (known, left) == ([], ["1 packages of type cargo", "1 packages of type deb"])


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", [], {"affected": 7}, record("x", ecosystem="Debian:13"),
     {"id": "X", "affected": [{"package": {"ecosystem": "PyPI"}}]}],
)  # fmt: skip
def test_file_that_is_not_an_export_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "all.zip"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        export(tmp_path, content)
    with pytest.raises(OsvError, match="not an export of OSV"):
        find(DOCUMENT, path)


@pytest.mark.parametrize("fault", ["encrypted", "damaged"])
def test_record_that_cannot_be_unpacked_is_refused(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.json", json.dumps(record("torch")))
    content = bytearray(path.read_bytes())
    if fault == "encrypted":
        content[6] |= 1
        content[content.index(b"PK\x01\x02") + 8] |= 1
    else:
        content[36] ^= 0xFF  # the first byte of its deflate stream
    path.write_bytes(content)
    with pytest.raises(OsvError, match="not an export of OSV"):
        find(DOCUMENT, path)


def test_oversized_record_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export(tmp_path, record("torch"))
    monkeypatch.setattr(sbom, "LARGEST", 9)
    with pytest.raises(OsvError, match=r"has 1\d\d bytes"):
        find(DOCUMENT, path)


@pytest.mark.parametrize("purl", ["pkg:", "torch", 7, None])
def test_sbom_with_a_name_that_cannot_be_parsed_is_refused(tmp_path: Path, purl: Any) -> None:
    document = {"components": [{"name": "torch", "components": [{"name": "x", "purl": purl}]}]}
    with pytest.raises(SbomError, match="invalid SBOM"):
        find(document, export(tmp_path, record("torch")))
