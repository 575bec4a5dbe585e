"""Requests to a server at a fixed concurrency, with the tokens of each streamed chunk counted.

A chunk is a step of the engine, so an answer of t tokens in s chunks had s - 1 drafts after its
first token, of which t - s tokens were accepted. `vllm bench serve` counts chunks as tokens, and
exits with 0 if every request failed.
"""

import asyncio
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal

import aiohttp
from pydantic import Field

from vllm_forge.bench.errors import ServerUnreachableError
from vllm_forge.bench.results import MOST_COUNT, Conditions, Count, Counters, Drafts, Row, Seconds
from vllm_forge.host import printable
from vllm_forge.matrix import FrozenModel
from vllm_forge.matrix.model import Text

LARGEST_LINE = 16 << 20  # the first chunk may have the prompt's tokens
LARGEST_ANSWER = 64 << 20
LARGEST_METRICS = 16 << 20
TIMEOUT_S = 1800.0  # for one answer
MOST_REASON = 200  # characters
METRICS_S = 60.0
HEALTH_S = 5.0
REMEDY = "start the server, and give its address: --url http://HOST:PORT"
# vllm/v1/spec_decode/metrics.py:229-255 and vllm/v1/metrics/loggers.py:596, 705 of 0.26.0;
# Prometheus appends _total to counters.
METRICS = {
    "drafts": "vllm:spec_decode_num_drafts_total",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens_total",
    "accepted": "vllm:spec_decode_num_accepted_tokens_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
    "tokens": "vllm:generation_tokens_total",
}
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
# A time and an exemplar may follow the value.
SAMPLE = re.compile(r'([\w:]+)(?:\{(?:[^"{}]|"(?:[^"\\]|\\.)*")*\})?[ \t]+(\S+)')
POSITION = re.compile(r'position="(\d{1,3})"')
DRAFTING = {"drafts", "draft_tokens", "accepted"}  # a server that does not draft has none of them
COUNTED_S = 30.0  # in which a step is counted whose answer was sent


@dataclass(frozen=True)
class Prompt:
    """An item; ``content`` is a text, token ids, or the messages of a chat.

    ``predicted``: by the number of drafted tokens.
    """

    item: str
    content: str | list[int] | list[dict[str, str]]
    predicted: dict[int, Drafts] = field(default_factory=dict)
    repeat: int = 0


class Answer(FrozenModel):
    """What came of a request: why it failed, in ``text``; or a line of a file of answers."""

    item: Text
    repeat: Count
    finish: Literal["stop", "length", "error"]
    tokens: Count
    seconds: Seconds
    ttft: Seconds | None
    text: str
    reasoning: str
    chunks: tuple[int, ...] = Field(default=(), exclude=True, description="tokens of each")

    def row(self, **facts: Any) -> Row:
        """Of a record's first start."""
        fault = self.text if self.finish == "error" else ""
        known = self.model_dump(include={"item", "repeat", "finish", "seconds", "ttft"})
        facts = {"fault": fault, **known, **facts}
        return Row(start=0, output_tokens=self.tokens, **facts)


def ask_all(
    url: str, model: str, prompts: Sequence[Prompt], conditions: Conditions,
    keep: Callable[[Answer], None] = lambda _: None,
) -> tuple[float, list[Answer]]:  # fmt: skip
    """Wall time, and an answer for each prompt, failed ones included; ``keep`` gets each."""
    waiting, answers = iter(prompts), list[Answer]()

    async def work(session: aiohttp.ClientSession) -> None:
        for prompt in waiting:
            answers.append(await _ask(session, url, _body(model, prompt, conditions), prompt))
            keep(answers[-1])

    async def run() -> float:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, read_bufsize=LARGEST_LINE
        ) as session:
            begin = time.perf_counter()
            await asyncio.gather(*(work(session) for _ in range(conditions.concurrency)))
            return time.perf_counter() - begin

    return asyncio.run(run()), answers


def is_healthy(url: str) -> bool:
    try:
        asyncio.run(_get(f"{url}/health", HEALTH_S))
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return False
    return True


def read_counters(url: str, before: int = 0, tokens: int = 0) -> Counters:
    """The server's metrics, once so many ``tokens`` more are counted; ServerUnreachableError.

    An answer may be sent before the step that made it is counted. Drafts are 0 where none is made.
    """
    end = time.monotonic() + COUNTED_S
    while True:
        try:
            counters = _parse_counters(asyncio.run(_get(f"{url}/metrics", METRICS_S)))
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            what = f"cannot read the server's metrics: {str(error) or repr(error)}"
            raise ServerUnreachableError(what, where=url, remedy=REMEDY) from None
        if not before <= counters.tokens < before + tokens or time.monotonic() >= end:
            return counters
        time.sleep(0.1)


async def _get(url: str, seconds: float) -> str:
    """ValueError: not the expected reply; of aiohttp: ClientError, TimeoutError."""
    content, timeout = bytearray(), aiohttp.ClientTimeout(total=seconds)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(url, allow_redirects=False) as reply,
    ):
        await _require_ok(reply)
        async for block in reply.content.iter_any():
            content += block
            if len(content) > LARGEST_METRICS:
                raise ValueError(f"more than {LARGEST_METRICS} bytes")
    return content.decode()


def _parse_counters(text: str) -> Counters:
    """Sums over engines and models; ValueError for what is not a count, or is missing.

    A server that does not draft has no counters of drafts; it has all others.
    """
    sums: dict[str, int] = {}
    positions: dict[int, int] = {}
    for line in text.splitlines():
        if (sample := SAMPLE.match(line)) is None:
            continue
        name, value = sample.groups()
        if name in METRICS.values():
            sums[name] = sums.get(name, 0) + _count(value)
        elif name == PER_POSITION and (place := POSITION.search(line)):
            at = int(place[1])
            positions[at] = positions.get(at, 0) + _count(value)
    drafting = {METRICS[key] for key in DRAFTING}
    missing = METRICS.values() - sums.keys()
    if drafting <= missing and not positions:
        missing -= drafting
    elif sorted(positions) != list(range(len(positions))) or not positions:
        missing.add(PER_POSITION)
    if missing:
        raise ValueError(f"no {', '.join(sorted(missing))}")
    counts = {key: sums.get(name, 0) for key, name in METRICS.items()}
    per_position = tuple(positions[place] for place in sorted(positions))
    return Counters.model_validate({**counts, "per_position": per_position})


def _count(text: str) -> int:
    if not 0 <= (value := float(text)) <= MOST_COUNT or not value.is_integer():
        raise ValueError(f"not a count: {text[:40]!r}")
    return int(value)


def _body(model: str, prompt: Prompt, conditions: Conditions) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": conditions.max_tokens,
        "temperature": conditions.temperature,
        "top_p": conditions.top_p,
        "ignore_eos": conditions.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if isinstance(prompt.content, str) or isinstance(prompt.content[0], int):
        return {**body, "prompt": prompt.content}
    thinking = {"thinking": conditions.thinking}
    return {**body, "messages": prompt.content, "chat_template_kwargs": thinking}


@dataclass
class _Stream:
    """A streamed answer as far as it came."""

    begin: float
    most: int  # tokens
    size: int = 0  # bytes
    tokens: int = 0
    chunks: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    ttft: float | None = None
    finish: str | None = None
    usage: int | None = None

    def add(self, line: bytes) -> None:
        """Add a line. ValueError, TypeError and others: it is not what was asked for."""
        self.size += len(line)
        if self.size > LARGEST_ANSWER:
            raise ValueError(f"more than {LARGEST_ANSWER} bytes")
        if not line.startswith(b"data:") or (data := line[5:].strip()) == b"[DONE]":
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise ValueError(str(chunk["error"]))
        self.usage = (chunk.get("usage") or {}).get("completion_tokens", self.usage)
        for choice in chunk["choices"]:
            if count := len(choice.get("token_ids") or ()):
                self.ttft = self.ttft or time.perf_counter() - self.begin
                self.chunks.append(count)
                self.tokens += count
            # vllm/entrypoints/openai/engine/protocol.py:393 of 0.26.0
            delta = choice.get("delta") or {}
            self.text.append(choice.get("text") or delta.get("content") or "")
            self.reasoning.append(delta.get("reasoning") or "")
            self.finish = choice.get("finish_reason") or self.finish
        if self.tokens > self.most:
            raise ValueError(f"more than {self.most} tokens")

    def answer(self, prompt: Prompt) -> Answer:
        """The whole answer; ValueError, TypeError if it is incomplete."""
        # A model may call a tool that it was not offered: a finished answer without a text.
        if self.finish not in {"stop", "length", "tool_calls"} or self.usage != self.tokens:
            raise ValueError("half an answer")
        text, reasoning = "".join(self.text), "".join(self.reasoning)
        (text + reasoning).encode()  # raises for half a surrogate pair
        return Answer(
            item=prompt.item, repeat=prompt.repeat,
            finish="length" if self.finish == "length" else "stop",
            tokens=self.tokens, text=text, reasoning=reasoning, chunks=tuple(self.chunks),
            seconds=time.perf_counter() - self.begin, ttft=self.ttft,
        )  # fmt: skip


async def _ask(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], prompt: Prompt
) -> Answer:
    """Stream one answer; whatever goes wrong is an answer with finish "error"."""
    path = "completions" if "prompt" in body else "chat/completions"
    stream = _Stream(begin=time.perf_counter(), most=body["max_tokens"])
    try:
        async with session.post(f"{url}/v1/{path}", json=body, allow_redirects=False) as reply:
            await _require_ok(reply)
            async for line in reply.content:
                stream.add(line)
        return stream.answer(prompt)
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError, AttributeError,
            RecursionError) as error:  # fmt: skip
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))[:MOST_REASON]
        return Answer(
            item=prompt.item, repeat=prompt.repeat, finish="error",
            tokens=0, seconds=0.0, ttft=None, text=reason, reasoning="",
        )  # fmt: skip


async def _require_ok(reply: aiohttp.ClientResponse) -> None:
    """ValueError also for a redirection: another host would be measured."""
    if reply.status != HTTPStatus.OK:
        text = (await reply.content.read(MOST_REASON)).decode(errors="replace")
        raise ValueError(f"the server answered with status {reply.status} {text}")
