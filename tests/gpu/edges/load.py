"""Clients of a server under load: those that wait, those that go, and those that are refused."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from tests.gpu.edges.rows import CARD
from tests.gpu.harness.device import query, ranks, visible
from tests.gpu.rehearsal.measured import SEED, best, prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.gpu.harness.server import Server

LONG = 20_000  # tokens of an answer that nobody waits for
DECODED = 96  # tokens of each answer while batches are looked at
KEPT = 1 << 16  # bytes of the end of a stream
FAULTS = 20  # of which the words are kept
WAITING, RUNNING = "vllm:num_requests_waiting", "vllm:num_requests_running"
# vLLM's own lines, uvicorn's, and those of Python.
ERROR = re.compile(r"^.*(?:\bERROR\b|Traceback \(most recent).*$", re.M)
# A row of --cudagraph-metrics: tokens, with padding, paddings, mode, count (0.26.0,
# compilation/cuda_graph.py:43, 81); vLLM logs them every VLLM_LOG_STATS_INTERVAL.
BATCH = re.compile(r"\|\s*(\d+)\s*\|\s*\d+\s*\|\s*\d+\s*\|\s*([A-Z]+)\s*\|\s*(\d+)\s*\|")


def _body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "temperature": 0, "ignore_eos": True, "prompt": [1000], **fields}


# Name -> a request that is answered with 4xx. 0.26.0: renderers/params.py:442 (length),
# v1/engine/input_processor.py:484 (vocabulary), entrypoints/serve/utils/error_response.py:48.
REFUSED: dict[str, bytes] = {
    "not JSON": b'{"model": "m", "prompt": [1,',
    "no prompt of tokens": json.dumps(_body(prompt={"text": 1})).encode(),
    "prompt too long": json.dumps(_body(prompt=[1000] * (CARD["max_model_len"] + 1))).encode(),
    "answer too long": json.dumps(_body(max_tokens=CARD["max_model_len"])).encode(),
    "token out of vocabulary": json.dumps(_body(prompt=[10**8], max_tokens=1)).encode(),
    "negative length": json.dumps(_body(max_tokens=-1)).encode(),
    "unknown model": json.dumps(_body(model="other", max_tokens=1)).encode(),
}


def send(server: Server, body: bytes, timeout: float | None = None) -> http.client.HTTPConnection:
    """Ask for a completion; the answer is not read."""
    wait = server.answer_s if timeout is None else timeout
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=wait)
    client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    return client


def wait_for_answer(server: Server, source: random.Random) -> None:
    count = source.randrange(8, 65)
    (prompt,) = prompts(1, source.randrange(16, 257), source.randrange(1 << 30))
    came = len(server.complete(prompt, count))
    assert came == count, f"{came} tokens of {count}"


def go_at_once(server: Server, source: random.Random) -> None:
    (prompt,) = prompts(1, 64, source.randrange(1 << 30))
    send(server, json.dumps(_body(prompt=prompt, max_tokens=LONG)).encode()).close()


def cancel(server: Server, source: random.Random) -> None:
    """Go in the middle of a stream."""
    (prompt,) = prompts(1, 64, source.randrange(1 << 30))
    body = _body(prompt=prompt, max_tokens=LONG, stream=True)
    client = send(server, json.dumps(body).encode())
    answer = client.getresponse()
    for _ in range(source.randrange(1, 40)):
        answer.readline()
    client.close()


def be_refused(server: Server, source: random.Random) -> None:
    name = source.choice(list(REFUSED))
    client = send(server, REFUSED[name])
    status = client.getresponse().status
    client.close()
    assert 400 <= status < 500, f"{name}: answered with {status}"


KINDS: dict[Callable[[Server, random.Random], None], int] = {
    wait_for_answer: 4, go_at_once: 2, cancel: 2, be_refused: 2,
}  # fmt: skip


@dataclass(kw_only=True)
class Load:
    """What clients did; ``faults`` are requests that ended otherwise than they should."""

    done: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)

    def run(self, server: Server, clients: int, seconds: float) -> None:
        """So many clients at a time, for so long; returns when all have their last answers."""
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(lambda number: self._client(server, number, end), range(clients)))

    def _client(self, server: Server, number: int, end: float) -> None:
        source = random.Random(SEED + number)  # noqa: S311 - not a secret
        while time.monotonic() < end:
            (kind,) = source.choices(list(KINDS), list(KINDS.values()))
            fault = ""
            try:
                kind(server, source)
            except (OSError, http.client.HTTPException, AssertionError, LookupError) as error:
                fault = f"{kind.__name__}: {type(error).__name__}: {error}"
            with self._lock:
                self.done[kind.__name__] += 1
                self.faults += [fault] if fault else []


def counters(server: Server) -> dict[str, float]:
    """Requests that run, and that wait."""
    found: dict[str, float] = {}
    for row in server.metrics().splitlines():
        name = re.split(r"[{ ]", row, maxsplit=1)[0]
        if name in {RUNNING, WAITING}:
            found[name] = found.get(name, 0) + float(row.rsplit(" ", 1)[1])
    if found.keys() != {RUNNING, WAITING}:
        raise LookupError(f"{RUNNING} and {WAITING} are not both exported")
    return found


def answers(server: Server, asked: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """Next token of each prompt, and its log probability, with the prompt in the prefix cache."""
    return [[best(server, prompt) for _ in range(2)][1] for prompt in asked]


def gpu_mib() -> list[int]:
    """MiB in use on each GPU of the tier."""
    return [int(query("memory.used", gpu=name)[0][0]) for name in visible()[: ranks()]]


def host_mib(leader: int) -> int:
    """Anonymous memory of all processes of a session."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == leader:
                text = (folder / "status").read_text(encoding="utf-8")
                total += sum(map(int, re.findall(r"^RssAnon:\s+(\d+) kB", text, re.M)))
        except OSError:
            continue  # it ended meanwhile
    return total >> 10


def errors(log: str) -> list[str]:
    return [found[0] for found in ERROR.finditer(log)]


def batches(log: str) -> Counter[tuple[int, str]]:
    """Tokens of a batch, without padding, and how it ran -> how often."""
    found: Counter[tuple[int, str]] = Counter()
    for tokens, mode, count in BATCH.findall(log):
        found[int(tokens), mode] += int(count)
    return found


def decode(server: Server, together: int) -> None:
    """So many answers of ``DECODED`` tokens, side by side; prefill fills whole steps meanwhile."""
    asked = prompts(together, seed=SEED + together)
    with ThreadPoolExecutor(together) as pool:
        list(pool.map(lambda prompt: server.complete(prompt, DECODED), asked))


def pend(server: Server, stream: bool, patience: float) -> str:
    """How a long request ends: ``answered``, ``hangs``, or by which error."""
    body, text = _body(max_tokens=LONG, stream=stream), b""
    end = time.monotonic() + patience
    try:
        client = send(server, json.dumps(body).encode(), patience)
        answer = client.getresponse()
        while piece := answer.read1(KEPT):
            text = (text + piece)[-KEPT:]
            if time.monotonic() > end:
                client.close()
                return "hangs"
    except TimeoutError:
        return "hangs"
    except (OSError, http.client.HTTPException) as error:
        return f"closed: {type(error).__name__}"
    if answer.status != 200 or b'"error"' in text:
        return f"error: {answer.status}"
    return "answered" if b"[DONE]" in text or not stream else "closed: cut off"
