"""Checkpoints in a folder, as an index alone, or in a Hub repository; missing ones are named."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.hub_server import COMMIT, HubServer
from tests.support.layouts import layout, profile_of
from vllm_forge.checkpoints.checkpoint import Checkpoint, Folder, HubRepository, find_source
from vllm_forge.checkpoints.errors import CheckpointUnreadableError, HubUnreachableError
from vllm_forge.checkpoints.inspect.checks_tensors import read_scalars
from vllm_forge.checkpoints.inspect.profile import Profile

if TYPE_CHECKING:
    from collections.abc import Iterator

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="session")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layout(tmp_path_factory.mktemp("places"), "card")


@pytest.fixture
def hub(card: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    files = {path.name: path.read_bytes() for path in card.iterdir()}
    with HubServer(files=files).running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def test_a_folder_is_one(card: Path) -> None:
    source = find_source(str(card))
    assert isinstance(source, Folder)
    assert (source.path, source.files) == (card, Folder(card).files)


def test_an_index_alone_gives_names(card: Path) -> None:
    profile = Profile.open(str(card / INDEX))
    assert profile.tensors == {}
    assert set(profile.names) == set(profile_of(card).names)
    assert profile.missing_shards == tuple(profile_of(card).shards)
    assert profile.formats == {}


def test_a_folder_whose_shards_are_missing_is_an_index_alone(card: Path, tmp_path: Path) -> None:
    for name in (INDEX, "config.json"):
        (tmp_path / name).write_bytes((card / name).read_bytes())
    assert Profile.open(tmp_path).tensors == {}


@pytest.mark.parametrize("wanted", ["nothing", "./nothing/here", "/nothing", "a/b/c", "~/x/y"])
def test_what_cannot_be_one_is_reported(wanted: str) -> None:
    with pytest.raises(CheckpointUnreadableError, match="is not a directory"):
        find_source(wanted)


def test_another_file_is_reported(card: Path) -> None:
    with pytest.raises(CheckpointUnreadableError, match="is not a directory, a model"):
        find_source(str(card / "config.json"))


class TestHub:
    def test_headers_are_those_of_the_folder(self, hub: HubServer, card: Path) -> None:
        profile = Profile.open("owner/name@main")
        assert profile.tensors == profile_of(card).tensors
        assert read_scalars(profile) == read_scalars(profile_of(card))
        assert str(profile.source) == f"owner/name@{COMMIT[:12]} at {hub.url}"

    def test_no_more_is_fetched_than_headers(self, hub: HubServer) -> None:
        # A shard whose data is much longer than its header.
        rows = {"big": {"dtype": "U8", "shape": [1 << 24], "data_offsets": [0, 1 << 24]}}
        text = json.dumps(rows).encode()
        hub.files = {
            "config.json": hub.files["config.json"],
            "model.safetensors": len(text).to_bytes(8, "little") + text + bytes(1 << 24),
        }
        Checkpoint.open("owner/name")
        assert hub.served < 1.1 * (1 << 20)

    def test_a_hub_that_ignores_ranges_is_read_too(self, hub: HubServer, card: Path) -> None:
        hub.ranges = False
        assert Profile.open("owner/name").tensors == profile_of(card).tensors

    def test_an_answer_that_is_too_short_is_reported(self, hub: HubServer) -> None:
        place = find_source("owner/name")
        hub.short = 1
        with pytest.raises(CheckpointUnreadableError, match="expected 10 bytes, got 9"):
            place.read("config.json", 0, 10)

    @pytest.mark.parametrize("failures", [[503, 500], [0, 0], [502, 0]])
    def test_read_retries_twice(
        self, hub: HubServer, monkeypatch: pytest.MonkeyPatch, failures: list[int]
    ) -> None:
        monkeypatch.setattr(time, "sleep", lambda _: None)
        source = find_source("owner/name")
        hub.failures = failures
        assert source.read("config.json", 0, 10) == hub.files["config.json"][:10]
        assert hub.requests == 3

    @pytest.mark.parametrize("status", [503, 0])
    def test_read_reports_third_failure(
        self, hub: HubServer, monkeypatch: pytest.MonkeyPatch, status: int
    ) -> None:
        monkeypatch.setattr(time, "sleep", lambda _: None)
        source = find_source("owner/name")
        hub.failures = [status] * 4
        with pytest.raises(HubUnreachableError, match="cannot read owner/name"):
            source.read("config.json", 0, 10)
        assert hub.requests == 3

    def test_read_does_not_retry_refusal(self, hub: HubServer) -> None:
        source = find_source("owner/name")
        hub.failures = [403]
        with pytest.raises(HubUnreachableError, match="403"):
            source.read("config.json", 0, 10)
        assert hub.requests == 1

    def test_nothing_of_nothing_is_not_asked_for(self, hub: HubServer) -> None:
        place = find_source("owner/name")
        assert place.read("config.json", 5, 5) == b""
        assert hub.served == 0

    def test_another_repository_is_reported(self, hub: HubServer) -> None:
        with pytest.raises(HubUnreachableError, match="cannot read owner/other") as error:
            HubRepository("owner/other")
        assert error.value.where == hub.url

    def test_a_gated_one_is_reported(self, hub: HubServer) -> None:
        hub.gated = True
        with pytest.raises(HubUnreachableError, match="HF_TOKEN"):
            HubRepository("owner/name")

    def test_a_host_that_refuses_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # nobody listens
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
            with pytest.raises(HubUnreachableError, match="give a folder"):
                HubRepository("owner/name")
