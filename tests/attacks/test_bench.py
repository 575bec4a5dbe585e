"""A server that is measured, records that were edited, results of another tool."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from tests.support.bench import CONDITIONS, rows_of, write_result
from tests.support.bench_server import BenchServer
from vllm_forge.bench import client, turns
from vllm_forge.bench.client import METRICS, PER_POSITION, Answer, Prompt, ask_all, read_counters
from vllm_forge.bench.errors import (
    ResultFileError,
    ServerUnreachableError,
    WorkloadFileError,
)
from vllm_forge.bench.exchange import read_run
from vllm_forge.bench.measure import read_workload
from vllm_forge.bench.results import Conditions, Setup, read_arm, write_arm
from vllm_forge.bench.scoring import score
from vllm_forge.bench.validity import require_valid
from vllm_forge.bench.workloads import Item, read_workloads

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = Prompt("i", [{"role": "user", "content": "q"}])


@dataclass
class HostileServer(BenchServer):
    """``lines``: of an answer; ``metrics``: the reply; ``endless``: both repeat their last part."""

    lines: list[bytes] = field(default_factory=list)
    metrics: bytes = b""
    endless: bool = False
    elsewhere: str = ""  # all requests are redirected there

    async def _reply(self, request: web.Request, parts: list[bytes]) -> web.StreamResponse:
        self.seen.append({"path": request.path})
        if self.elsewhere:
            raise web.HTTPTemporaryRedirect(f"{self.elsewhere}{request.path}")
        response = web.StreamResponse()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        while self.endless:
            try:
                await response.write(parts[-1] * 1000)
            except ConnectionError:
                break
        return response

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        return await self._reply(request, self.lines)

    async def _health(self, request: web.Request) -> Any:
        return await self._reply(request, [b""])

    async def _metrics(self, request: web.Request) -> Any:
        return await self._reply(request, [self.metrics])


def data(document: object) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def tokens(count: int = 1, **changes: Any) -> list[bytes]:
    choice = {"token_ids": [1] * count, "finish_reason": "stop", "delta": {"content": "x"}}
    usage = {"choices": [], "usage": {"completion_tokens": count}}
    return [data({"choices": [choice | changes]}), data(usage)]


def ask(server: BenchServer) -> Answer:
    conditions = Conditions.model_validate({**CONDITIONS, "concurrency": 1, "max_tokens": 8})
    (answer,) = ask_all(server.url, "model", [PROMPT], conditions)[1]
    return answer


def test_plain_answer_is_one() -> None:
    with HostileServer(lines=tokens()) as server:
        assert (ask(server).finish, ask(server).tokens) == ("stop", 1)


@pytest.mark.parametrize(
    "lines",
    [
        tokens(finish_reason=["stop"]), tokens(delta={"content": 5}), tokens(token_ids=1),
        tokens(delta={"content": "\ud800"}), tokens(delta=[1]), tokens(9), tokens(100_000),
        [data([])], [data({"choices": None})], [b"data: " + b"[" * 100_000 + b"\n\n"],
        [b"data: \xff\n\n"], [b"data: {\n\n"], tokens()[:1],
    ],
    ids=["finish", "text", "ids", "surrogate", "delta", "a token more", "many tokens", "list",
         "no choices", "deep", "bytes", "half", "no usage"],
)  # fmt: skip
def test_malformed_answer_is_a_failed_request(lines: list[bytes]) -> None:
    with HostileServer(lines=lines) as server:
        assert ask(server).finish == "error"


def test_error_in_a_stream_is_the_reason() -> None:
    with HostileServer(lines=[data({"error": {"message": "no\x1b[2J KV\ncache " * 99}})]) as server:
        answer = ask(server)
    assert answer.finish == "error"
    assert answer.text.startswith("ValueError: {'message': 'no\\x1b[2J KV\\ncache ")
    assert len(answer.text) == client.MOST_REASON


@pytest.mark.parametrize("line", [b": ping\n", tokens()[0], data({"choices": []})])
def test_endless_answer_ends(line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LARGEST_ANSWER", 1 << 20)
    with HostileServer(lines=[line], endless=True) as server:
        assert ask(server).finish == "error"


def counters(value: str) -> bytes:
    lines = [f"{name} {value}" for name in METRICS.values()]
    return "\n".join([*lines, f'{PER_POSITION}{{position="0"}} 1', ""]).encode()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e400", "1e308", "0.5", "\x1b[2J"])
def test_counter_that_is_not_a_count_is_refused(value: str) -> None:
    with HostileServer(metrics=counters(value)) as server:
        with pytest.raises(ServerUnreachableError) as caught:
            read_counters(server.url)
        assert "\x1b" not in str(caught.value)


def test_endless_metrics_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LARGEST_METRICS", 1 << 20)
    with HostileServer(metrics=counters("1"), endless=True) as server:  # noqa: SIM117
        with pytest.raises(ServerUnreachableError, match="more than 1048576 bytes"):
            read_counters(server.url)


def test_another_host_is_not_asked() -> None:
    """It would be measured in place of the server, and gets the prompts."""
    with HostileServer(lines=tokens(), metrics=counters("1")) as other:
        with HostileServer(elsewhere=other.url) as server:
            assert ask(server).finish == "error"
            with pytest.raises(ServerUnreachableError, match="status 307"):
                read_counters(server.url)
            assert not client.is_healthy(server.url)
        assert other.seen == []


def test_password_of_a_url_is_not_shown() -> None:
    with HostileServer(metrics=b"") as server:
        url = server.url.replace("http://", "http://me:hunter2@")
        with pytest.raises(ServerUnreachableError) as caught:
            read_counters(url)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in json.dumps(caught.value.as_dict())


def test_answer_of_many_open_blocks_is_scored_in_linear_time() -> None:
    """A model that repeats itself writes such answers."""
    row, item = read_workloads()["chat-code"], Item("q", "question", entry="f", test="")
    text = "```python\n" * 200_000
    begin = time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "vllm_forge.bench.scoring.judge", lambda *_: type("V", (), {"right": False, "why": "w"})
        )
        assert not score(row, item, "stop", text).flexible
    assert time.process_time() - begin < 60  # a quadratic search takes an hour


def test_wrong_number_of_a_megabyte_is_not_repeated() -> None:
    row = read_workloads()["aime"]
    assert len(score(row, Item("q", "question", answer="1"), "stop", "7" * 1_000_000).fault) < 300


VLLM: dict[str, Any] = {
    "max_concurrency": 4, "completed": 32, "failed": 0, "total_output_tokens": 2048,
    "output_throughput": 129.2, "mean_ttft_ms": 277.0, "mean_tpot_ms": 26.6,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"mean_ttft_ms": None}, {"mean_ttft_ms": "1"}, {"mean_ttft_ms": math.nan},
        {"output_throughput": -1.0}, {"output_throughput": 10**400}, {"completed": math.inf},
        {"total_output_tokens": 10**400}, {"benchmarks": []}, {"mean_tpot_ms": [1]},
    ],
)  # fmt: skip
def test_invalid_figure_of_another_tool_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "other.json").write_text(json.dumps({**VLLM, **change}))
    with pytest.raises(ResultFileError):
        read_run(tmp_path / "other.json")


@pytest.mark.parametrize("name", ["output_throughput", "mean_ttft_ms", "mean_tpot_ms"])
def test_missing_figure_does_not_agree(tmp_path: Path, name: str) -> None:
    rest = {key: value for key, value in VLLM.items() if key != name}
    (tmp_path / "other.json").write_text(json.dumps(rest))
    with pytest.raises(ResultFileError, match=name):
        read_run(tmp_path / "other.json")


def test_missing_folder_of_plans_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert turns.main([str(tmp_path / "none"), str(tmp_path)]) == 33
    assert "No such file" in capsys.readouterr().err


def test_enormous_count_is_refused(tmp_path: Path) -> None:
    """Of which no rate can be computed."""
    path = write_result(tmp_path / "a.json", rows_of(1, items=3))
    record = json.loads(path.read_text())
    record["starts"][0]["window"]["after"]["draft_tokens"] = 10**400
    path.write_text(json.dumps(record))
    with pytest.raises(ResultFileError, match="draft_tokens: Input should be less than or equal"):
        require_valid(read_arm(path))


def test_full_disk_loses_no_earlier_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are written, the record is not: it would be of other rows."""
    path = write_result(tmp_path / "a.json", rows_of(1, items=3))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    arm = read_arm(path).result

    def full(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("vllm_forge.host.write_json", full)
    setup = Setup(**{name: getattr(arm, name) for name in Setup.model_fields})
    with pytest.raises(OSError, match="No space left"):
        write_arm(path, setup, arm.starts, rows_of(2, items=3))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "change",
    [
        {"predicted": [1]},
        {"predicted": None},
        {"item": [[]]},
        {"item": None},
        {"prompt": 1},
        {"item": "a\nb"},
    ],
)
def test_malformed_prompt_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    row = {"item": "a", "prompt": "text", "predicted": {}} | change
    (tmp_path / "w.jsonl").write_text(json.dumps(row))
    with pytest.raises(WorkloadFileError, match="invalid workload"):
        read_workload(tmp_path / "w.jsonl")
