"""A server that answers at once: how fast the client is by itself. Run as a program."""

import asyncio
import json
import sys
from typing import Any

from aiohttp import web


def chunk(token_ids: list[int], finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": "x", "token_ids": token_ids, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def usage(tokens: int) -> bytes:
    document = {"choices": [], "usage": {"completion_tokens": tokens}}
    return b"data: " + json.dumps(document).encode() + b"\n\ndata: [DONE]\n\n"


async def answer(request: web.Request) -> web.StreamResponse:
    """As many chunks of one token as were asked for."""
    body: dict[str, Any] = await request.json()
    reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await reply.prepare(request)
    most = int(body["max_tokens"])
    for number in range(most):
        await reply.write(chunk([number], "length" if number == most - 1 else None))
    await reply.write(usage(most))
    return reply


async def serve() -> None:
    """Print the port, and serve until standard input ends."""
    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve())
