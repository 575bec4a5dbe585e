"""A server whose answers are texts, as a test wants them.

Run as a program, PORT: a server of a session, which knows that the answer to "question 3" is
"word-3", and takes "question 1" for another.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tests.support.bench_server import BenchServer
from vllm_forge.bench.null_server import usage

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Reply:
    text: str
    finish: str = "stop"
    tokens: int = 5
    reasoning: str = ""
    failed: bool = False


@dataclass
class AnswerServer(BenchServer):
    """``reply``: to the last message of a chat."""

    reply: Callable[[str], Reply] = field(default=Reply)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body: dict[str, Any] = await request.json()
        self.seen.append(body)
        reply = self.reply(body["messages"][-1]["content"])
        if reply.failed:
            return web.Response(status=500)
        delta = {"content": reply.text, "reasoning": reply.reasoning}
        choice = {"delta": delta, "token_ids": [1] * reply.tokens, "finish_reason": reply.finish}
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
        await response.write(usage(reply.tokens))
        return response


def known(question: str) -> Reply:
    number = question.rsplit(maxsplit=1)[-1]
    return Reply("other" if number == "1" else f"word-{number}")


if __name__ == "__main__":
    with AnswerServer(reply=known, port=int(sys.argv[1])):
        signal.pause()
