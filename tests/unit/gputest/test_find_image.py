"""Which image a run was of: the engine that has it, and the digest that a registry knows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from vllm_forge.gputest import launch as product
from vllm_forge.gputest.launch import SuiteImage
from vllm_forge.host.probe import Reply
from vllm_forge.images.errors import EngineUnreachableError, LayoutError
from vllm_forge.images.layout import write_image
from vllm_forge.receipts.errors import ReceiptSubjectError
from vllm_forge.serve.errors import NoGpuError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vllm_forge.images.layout import Image

NAME = "host:5000/team/vllm:0.26"


def described(text: str, **more: Any) -> dict[str, Any]:
    """What an engine says of an image: ``id|tree|repository digests``."""
    digest, tree, known = text.strip().split("|")
    labels = {"io.vllm-forge.tree": tree} if tree else None
    image = {"Id": digest, "Digest": digest, "RepoDigests": known.split()}
    return image | {"Config": {"Labels": labels}} | more


class Engines:
    """A host whose engines have these images; docker's is asked by the SDK."""

    def __init__(self, docker: str | None = None, podman: str | None = None, **more: Any) -> None:
        self.docker = None if docker is None else described(docker, **more)
        self.podman = podman

    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        assert argv[:3] == ["podman", "image", "inspect"]
        if self.podman is None:
            return Reply(code=125, text="no such image")
        return Reply(code=0, text=json.dumps([described(self.podman)]))


def ask(host: Engines, name: str, layout: Path) -> tuple[str, SuiteImage]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_forge.gputest.launch.inspect_image", lambda _: host.docker)
        return product.find_image(host, name, layout)


def find_image(host: Engines, name: str, layout: Path) -> SuiteImage:
    return ask(host, name, layout)[1]


@pytest.fixture
def built(tmp_path: Path) -> Image:
    return write_image(tmp_path / "layout", layers=[], config={}, epoch=0, name=NAME)


def config_of(image: Image) -> str:
    return str(image.manifest["config"]["digest"])


def test_engine_digest_and_labels_are_found(tmp_path: Path) -> None:
    labels = {"io.vllm-forge.tree": "7ree"}
    engine, image = ask(Engines(podman="sha256:d1|7ree|\n"), "x", tmp_path / "none")
    assert (engine, image) == ("podman", SuiteImage(name="x", digest="d1", labels=labels))
    both = Engines(docker="sha256:d0|7ree|x@sha256:d0", podman="sha256:d1|7ree|")
    assert ask(both, "x", tmp_path / "none")[0] == "docker"


def test_foreign_image_has_no_labels(tmp_path: Path) -> None:
    image = find_image(Engines(docker="sha256:d0||x@sha256:d0"), "x", tmp_path / "none")
    assert (image.digest, image.labels) == ("d0", {})


def test_stopped_docker_is_named_when_no_engine_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_: str) -> None:
        raise EngineUnreachableError("the docker daemon is not running")

    monkeypatch.setattr(product, "inspect_image", stopped)
    with pytest.raises(NoGpuError, match="no container engine has x") as error:
        product.find_image(Engines(), "x", tmp_path / "none")
    assert error.value.where == "the docker daemon is not running; podman: no such image"


def test_descriptor_is_the_manifest(tmp_path: Path) -> None:
    descriptor = {"digest": "sha256:d7"}
    host = Engines(docker="sha256:c0|7ree|", Descriptor=descriptor)
    assert find_image(host, "x", tmp_path / "none").digest == "d7"


def test_no_engine_has_it(tmp_path: Path) -> None:
    with pytest.raises(NoGpuError, match="no container engine has x"):
        find_image(Engines(), "x", tmp_path / "none")


@pytest.mark.parametrize(
    "known",
    [
        "host:5000/team/vllm@sha256:d1",
        "host:5000/team/vllm@sha256:d1 other/vllm@sha256:d2",
        "other/vllm@sha256:d1",
        "a@sha256:d1 b@sha256:d1",
    ],
)
def test_an_image_from_a_registry_is_known_by_its_manifest(tmp_path: Path, known: str) -> None:
    """Docker's older store names the configuration: a receipt of that is of no known image."""
    found = find_image(Engines(docker=f"sha256:c0|7ree|{known}"), NAME, tmp_path / "none")
    assert found.digest == "d1"


@pytest.mark.parametrize("name", ["host:5000/vllm", "host:5000/vllm:1", "host:5000/vllm@sha256:d1"])
def test_the_manifest_is_that_of_the_names_repository(tmp_path: Path, name: str) -> None:
    known = "host:5000/vllm@sha256:d1 host@sha256:d2 host:5000/other@sha256:d3"
    found = find_image(Engines(docker=f"sha256:c0|7ree|{known}"), name, tmp_path / "none")
    assert found.digest == "d1"


def test_a_loaded_image_is_that_of_the_build(built: Image) -> None:
    for stored in (f"sha256:{built.digest}", config_of(built)):
        found = find_image(Engines(docker=f"{stored}|7ree|"), NAME, built.path)
        assert found.digest == built.digest


@pytest.mark.parametrize("known", ["", "a@sha256:d1 b@sha256:d2"])
def test_an_image_whose_manifest_nobody_knows_is_refused(
    tmp_path: Path, built: Image, known: str
) -> None:
    for layout in (tmp_path / "none", built.path):
        with pytest.raises(ReceiptSubjectError, match="configuration sha256:c0; the manifest"):
            find_image(Engines(docker=f"sha256:c0|7ree|{known}"), NAME, layout)


def test_a_damaged_build_is_reported(built: Image) -> None:
    (built.path / "index.json").write_text("{")
    with pytest.raises(LayoutError):
        find_image(Engines(docker="sha256:c0|7ree|"), NAME, built.path)


@pytest.mark.parametrize("answer", ["", "{", "[]", "[{}]", "[7]", '[{"Digest": 7}]', "[" * 99999])
def test_unexpected_answer_of_podman_is_reported(answer: str, tmp_path: Path) -> None:
    class Host(Engines):
        def ask(self, name: str, argv: Sequence[str]) -> Reply:
            return Reply(code=0, text=answer)

    with pytest.raises(NoGpuError) as refused:
        ask(Host(), NAME, tmp_path)
    assert "podman: unexpected answer" in refused.value.where
