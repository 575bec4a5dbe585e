"""The docker daemon is asked through the SDK; every way it fails has a remedy."""

from __future__ import annotations

import hashlib
import json
import socket
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.docker_daemon import INFO, VERSION, docker_daemon
from vllm_forge.host import RecordingRunner
from vllm_forge.images.docker_api import answers, check_daemon, inspect_image
from vllm_forge.images.engines import Buildx
from vllm_forge.images.errors import (
    EngineSetupError,
    EngineTooOldError,
    EngineUnreachableError,
)

if TYPE_CHECKING:
    from pathlib import Path

DAEMON: dict[str, Any] = {"/version": VERSION, "/info": INFO, "/_ping": "OK"}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A socket that DOCKER_HOST names, and no configuration of docker's."""
    path = tmp_path / "docker.sock"
    for name in ("DOCKER_CONTEXT", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
    return path


def test_current_daemon_with_the_containerd_store_is_accepted(path: Path) -> None:
    with docker_daemon(path, DAEMON) as asked:
        check_daemon()
        assert answers()
    assert {"/version", "/info", "/_ping"} <= set(asked)


def test_stopped_daemon_is_reported(path: Path) -> None:
    with pytest.raises(EngineUnreachableError, match="daemon is not running") as error:
        check_daemon()
    assert "systemctl start docker" in error.value.remedy
    assert str(path) in error.value.where
    assert not answers()


def test_socket_without_a_listener_is_a_stopped_daemon(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with pytest.raises(EngineUnreachableError, match="daemon is not running"):
        check_daemon()


def test_permission_error_names_the_group(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("socket.socket.connect", refuse)
    with pytest.raises(EngineUnreachableError, match="permission denied") as error:
        check_daemon()
    assert "group docker" in error.value.remedy


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ({"ApiVersion": "1.20", "Version": "1.8.0"}, "the docker daemon is too old"),
        ({"Version": "20.10.24"}, "docker is 20.10.24, at least 25.0 is needed"),
        ({"Version": ""}, "of unknown version"),
    ],
)
def test_old_daemon_is_refused(path: Path, version: dict[str, str], message: str) -> None:
    with (
        docker_daemon(path, DAEMON | {"/version": VERSION | version}),
        pytest.raises(EngineTooOldError, match=message) as error,
    ):
        check_daemon()
    assert "upgrade" in error.value.remedy


@pytest.mark.parametrize("status", [[["Backing Filesystem", "extfs"]], [], None])
def test_classic_image_store_is_refused(path: Path, status: list[list[str]] | None) -> None:
    info = {"Driver": "overlay2", "DriverStatus": status}
    with (
        docker_daemon(path, DAEMON | {"/info": info}),
        pytest.raises(EngineSetupError, match="classic image store") as error,
    ):
        check_daemon()
    assert "containerd-snapshotter" in error.value.remedy
    assert "overlay2" in error.value.where


def test_socket_of_podman_is_named(path: Path) -> None:
    version = VERSION | {"Version": "5.4.2", "Components": [{"Name": "Podman Engine"}]}
    with (
        docker_daemon(path, DAEMON | {"/version": version}),
        pytest.raises(EngineSetupError, match="podman answers at its address") as error,
    ):
        check_daemon()
    assert "DOCKER_HOST" in error.value.remedy


def test_daemon_that_answers_nonsense_is_unreachable(path: Path) -> None:
    with (
        docker_daemon(path, {"/version": {}}),
        pytest.raises(EngineUnreachableError, match="does not answer"),
    ):
        check_daemon()


def test_docker_context_is_honoured(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DOCKER_HOST")
    config = tmp_path / "config"
    meta = config / "contexts" / "meta" / hashlib.sha256(b"far").hexdigest()
    meta.mkdir(parents=True)
    (config / "config.json").write_text(json.dumps({"currentContext": "far"}))
    endpoints = {"docker": {"Host": f"unix://{path}", "SkipTLSVerify": False}}
    context = {"Name": "far", "Metadata": {}, "Endpoints": endpoints}
    (meta / "meta.json").write_text(json.dumps(context))
    with pytest.raises(EngineUnreachableError) as error:
        check_daemon()
    assert str(path) in error.value.where
    with docker_daemon(path, DAEMON):
        check_daemon()


def test_unknown_image_gives_none(path: Path) -> None:
    image = {"Id": "sha256:d0", "RepoDigests": ["x@sha256:d0"]}
    with docker_daemon(path, DAEMON | {"/images/x/json": image}):
        assert inspect_image("x") == image
        assert inspect_image("y") is None


def test_dry_run_asks_no_daemon(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = RecordingRunner()
    Buildx().check(runner)
    assert runner.commands == [["docker", "buildx", "version"]]
    assert capsys.readouterr().out.startswith("# check the docker daemon's version")
