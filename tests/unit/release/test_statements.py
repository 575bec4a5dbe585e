"""Statements: one form for one value; a provenance says what was built, and no more."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
from datetime import UTC
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from tests.support.built import Built, built_image, commit_all
from tests.support.fast_build import use
from tests.support.keys import key_pair
from vllm_forge.images.errors import BuildRecordError
from vllm_forge.patches import read_tree_lock
from vllm_forge.release import statements
from vllm_forge.release.errors import ProvenanceError
from vllm_forge.release.statements import (
    VSA,
    Provenance,
    make_provenance,
    remote_uri,
)
from vllm_forge.signing import PrivateKey, load_private
from vllm_forge.signing.bundle import Statement, Subject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.xdist_group("statements")  # one worker builds what its fixtures have

DIGEST = "5" * 64


def test_statement_is_canonical_json() -> None:
    subject = Subject(name="image", digest={"sha256": DIGEST})
    statement = Statement(subject=(subject,), predicate_type=VSA, predicate={"b": 1, "a": "ä"})
    data = json.loads(statement.content)
    assert data["_type"] == "https://in-toto.io/Statement/v1"
    assert data["predicateType"] == VSA
    assert statement.content.endswith(
        b'{"digest":{"sha256":"' + DIGEST.encode() + b'"},"name":"image"}]}'
    )
    assert Statement.model_validate_json(statement.content) == statement


def test_subject_is_found_by_digest() -> None:
    subject = Subject(name="image", digest={"sha256": DIGEST})
    statement = Statement(subject=(subject,), predicate_type=VSA, predicate={})
    assert statement.has_subject(f"sha256:{DIGEST}")
    assert not statement.has_subject("sha256:" + "6" * 64)
    assert not statement.has_subject(DIGEST)


def test_statement_without_subject_is_refused() -> None:
    with pytest.raises(ValidationError):
        Statement(subject=(), predicate_type=VSA, predicate={})


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Built, str]]:
    with built_image(tmp_path_factory.mktemp("statements")) as built:
        yield built, commit_all(built.mini.root)


@pytest.fixture
def built(committed: tuple[Built, str], monkeypatch: pytest.MonkeyPatch) -> Built:
    use(committed[0].mini, monkeypatch)
    return committed[0]


@pytest.fixture
def key(tmp_path: Path) -> PrivateKey:
    return load_private(key_pair(tmp_path, "p256")[0])


def make(built: Built, key: PrivateKey | None, record: dict[str, Any] | None = None) -> Statement:
    return make_provenance(built.project, built.cell, built.image, record or built.record, key)


def parsed(statement: Statement) -> Provenance:
    return Provenance.model_validate(statement.predicate)


def test_provenance_says_what_was_built(
    built: Built, committed: tuple[Built, str], key: PrivateKey
) -> None:
    statement = make(built, key)
    provenance = parsed(statement)
    assert statement.has_subject(f"sha256:{built.image.digest}")
    assert (provenance.definition.external.sku, provenance.definition.external.line) == (
        "alpha",
        "mini",
    )
    options = provenance.definition.external.options
    assert (options.base, options.engine) == ("current", "buildah")
    assert (provenance.commit, provenance.source) == (committed[1], "")
    tree = read_tree_lock(built.mini.root / "patches/vllm/mini", "mini")
    assert provenance.tree == tree.result
    assert provenance.run.builder.id.endswith(f"/key/{key.public.id}")
    newest = max(built.record["blobs"].values()) / 1e9
    assert 0 <= newest - provenance.run.metadata.finished.timestamp() < 1
    assert provenance.run.metadata.finished.tzinfo == UTC


def test_provenance_lists_every_input_by_hash(built: Built, key: PrivateKey) -> None:
    rows = {row.name: row for row in parsed(make(built, key)).definition.dependencies}
    for wheel in built.project.lock("mini").wheels:
        assert rows[wheel.filename].digest == {"sha256": wheel.sha256}
    patch = "patches/vllm/mini/0001-flag.patch"
    content = (built.mini.root / patch).read_bytes()
    assert rows[patch].digest == {"sha256": hashlib.sha256(content).hexdigest()}
    tree = read_tree_lock(built.mini.root / "patches/vllm/mini", "mini")
    assert rows["vllm source"].digest == {"sha256": tree.sha256, "gitTree": tree.base}
    system = built.record["stack"]["base"]["system"]
    assert rows["system layers"].digest == {"sha256": system}


def test_provenance_has_the_same_bytes_each_time(built: Built, key: PrivateKey) -> None:
    """A release that goes on after kill -9 attaches the same statement."""
    assert make(built, key).content == make(built, key).content


@pytest.mark.parametrize(
    ("label", "base"),
    [("sha256:" + "7" * 64, "locked"), ("debian@sha256:" + "7" * 64, "debian@sha256:" + "7" * 64)],
)
def test_provenance_names_the_base_as_build_takes_it(
    built: Built, key: PrivateKey, label: str, base: str
) -> None:
    record = copy.deepcopy(built.record)
    record["stack"]["base"]["packages"] = label
    assert parsed(make(built, key, record)).definition.external.options.base == base


def test_kernel_archives_are_a_parameter_and_dependencies(built: Built, key: PrivateKey) -> None:
    record = copy.deepcopy(built.record)
    assert not parsed(make(built, key, record)).definition.external.options.kernels
    record["stack"]["kernels"] = {"TRTLLM_GEN_BMM": "8" * 64}
    provenance = parsed(make(built, key, record))
    assert provenance.definition.external.options.kernels
    rows = {row.name: row.digest for row in provenance.definition.dependencies}
    assert rows["kernel archive TRTLLM_GEN_BMM"] == {"sha256": "8" * 64}


def test_prewarm_set_is_a_parameter(built: Built, key: PrivateKey) -> None:
    record = copy.deepcopy(built.record)
    record["stack"]["prewarm"] = {"sha256": "8" * 64}
    provenance = parsed(make(built, key, record))
    assert provenance.definition.external.options.prewarm == "8" * 64


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["buildDefinition"]["externalParameters"].update(branch="x"),
        lambda data: data["buildDefinition"]["externalParameters"]["options"].update(x="y"),
        lambda data: data["buildDefinition"].update(buildType="https://other.example/v1"),
        lambda data: data["runDetails"].update(byproducts=[]),
    ],
)
def test_unknown_parameter_is_refused(
    built: Built, key: PrivateKey, change: Callable[[dict[str, Any]], object]
) -> None:
    data = json.loads(make(built, key).content)["predicate"]
    change(data)
    with pytest.raises(ValidationError):
        Provenance.model_validate(data)


def test_changed_checkout_is_not_attested(built: Built, key: PrivateKey) -> None:
    path = built.mini.root / "note"
    path.touch()
    try:
        with pytest.raises(ProvenanceError, match="names a commit, and 1 files differ"):
            make(built, key)
    finally:
        path.unlink()


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(digest="sha256:" + "0" * 64),
        lambda record: record["stack"].update(tree="0" * 40),
        lambda record: record["stack"]["lock"].update(sha256="0" * 64),
    ],
)
def test_image_of_another_checkout_is_not_attested(
    built: Built, key: PrivateKey, change: Callable[[dict[str, Any]], object]
) -> None:
    record = copy.deepcopy(built.record)
    change(record)
    with pytest.raises(BuildRecordError, match="not of this checkout"):
        make(built, key, record)


def test_checkout_without_commit_is_not_attested(
    built: Built, key: PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statements, "head_commit", lambda _: (None, []))
    with pytest.raises(ProvenanceError, match="the checkout has no commit"):
        make(built, key)


def test_job_of_hosted_ci_is_named_by_its_workflow(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://ci.example")
    monkeypatch.setenv("GITHUB_WORKFLOW_REF", "o/r/.github/workflows/x.yml@refs/heads/main")
    identity = "https://ci.example/o/r/.github/workflows/x.yml@refs/heads/main"
    assert parsed(make(built, None)).run.builder.id == identity


def test_builder_without_key_or_workflow_is_refused(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_WORKFLOW_REF", raising=False)
    with pytest.raises(ProvenanceError, match="the builder has no id"):
        make(built, None)


def test_machine_is_distinguished_without_its_id(
    built: Built, key: PrivateKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "machine-id"
    monkeypatch.setattr(statements, "MACHINE_ID", path)
    assert parsed(make(built, key)).run.builder.machine is None
    machines = set()
    for value in ("a" * 32, "b" * 32):
        path.write_text(value + "\n")
        statement = make(built, key)
        assert value.encode() not in statement.content
        machines.add(parsed(statement).run.builder.machine)
    assert len(machines) == 2


@pytest.mark.parametrize(
    ("address", "uri"),
    [
        ("https://example.invalid/o/r.git", "https://example.invalid/o/r.git"),
        ("https://user:secret@example.invalid/o/r", "https://example.invalid/o/r"),
        ("ssh://git@example.invalid/o/r", "ssh://example.invalid/o/r"),
        ("git@example.invalid:o/r.git", "ssh://example.invalid/o/r.git"),
        ("/home/somebody/r", ""),
        ("file:///home/somebody/r", ""),
    ],
)
def test_source_is_a_url_without_credentials(tmp_path: Path, address: str, uri: str) -> None:
    for argv in (["init", "-q"], ["remote", "add", "origin", address]):
        subprocess.run(["git", "-C", tmp_path, *argv], check=True, capture_output=True)
    assert remote_uri(tmp_path) == uri


def test_source_of_a_folder_without_remote_is_empty(tmp_path: Path) -> None:
    assert remote_uri(tmp_path) == ""
