"""A server that speaks vLLM's streaming completions and metrics, with planted faults.

Run as a program: PORT [FAULT [CACHE]], or as `vllm serve MODEL`. It then is a server of a session,
until it is ended.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tests.gpu.models import exact_mtp
from vllm_forge.bench.null_server import chunk, usage

if TYPE_CHECKING:
    from types import TracebackType

DEPTH = 2  # drafted tokens a step
PI, PROPOSALS = exact_mtp.permutation(), exact_mtp.proposals("fraction")
METRICS = """# HELP vllm:spec_decode_num_drafts_total of a fake
vllm:spec_decode_num_drafts_total{{engine="0"}} {drafts:.1f}
vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {draft_tokens:.1f}
vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {accepted:.1f}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} {first:.1f}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="1"}} {second:.1f}
vllm:prefix_cache_hits_total{{engine="0"}} {prefix_hits:.1f}
vllm:generation_tokens_total{{engine="0"}} {tokens:.1f}
"""


@dataclass
class BenchServer:
    """Each step gives one token and one accepted draft. ``seen``: the bodies of all requests.

    ``depth`` 0: no drafts. ``exact``: those of the model that is known exactly.
    """

    fault: str = ""
    cache: Path | None = None
    seen: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    port: int = 0
    depth: int = DEPTH
    exact: bool = False

    def __post_init__(self) -> None:
        names = ("drafts", "draft_tokens", "accepted", "first", "second", "prefix_hits", "tokens")
        self.counts = dict.fromkeys(names, 1000 if self.fault == "reset" else 0)
        self._loop = asyncio.new_event_loop()
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def __enter__(self) -> BenchServer:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/health", self._health)
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port, reuse_port=True).start()  # as vLLM
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, _: web.Request) -> web.Response:
        rows = METRICS.format(**self.counts).splitlines(keepends=True)
        text = "".join(row for row in rows if self.depth or "spec_decode" not in row)
        if self.fault == "reset":  # as if the server had been restarted since
            self.counts = dict.fromkeys(self.counts, 0)
        return web.Response(text=text)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append(body)
        if self.fault == "failed" and len(self.seen) % 3 == 0:
            return web.Response(status=500, text="full")
        reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await reply.prepare(request)
        most = body["max_tokens"] - (2 if self.fault == "short" else 0)
        tokens, taken = 1, list[int]()
        await reply.write(chunk([0], "length" if most == 1 else None))
        while tokens < most:
            taken.append(self._taken(body["prompt"], tokens))
            count = min(1 + taken[-1], most - tokens)
            tokens += count
            last = "length" if tokens == most else None
            if self.fault != "merged":
                await reply.write(chunk(list(range(count)), last))
        if self.fault == "merged":  # several steps in one chunk, as a slow client gets them
            await reply.write(chunk(list(range(most - 1)), "length"))
        self._count(taken, tokens)
        if self.fault == "cut":
            request.transport.abort()  # type: ignore[union-attr]
            return reply
        await reply.write(usage(tokens - (1 if self.fault == "usage" else 0)))
        return reply

    def _taken(self, prompt: Any, made: int) -> int:
        """Drafts that a step accepts after so many tokens."""
        if not self.exact:
            return min(1, self.depth)
        token, taken = exact_mtp.orbit(prompt[-1], made)[-1], 0
        while taken < self.depth and PROPOSALS[token] == PI[token]:
            token, taken = PI[token], taken + 1
        return taken

    def _count(self, taken: list[int], tokens: int) -> None:
        self.counts["drafts"] += len(taken)
        self.counts["draft_tokens"] += self.depth * len(taken)
        self.counts["accepted"] += sum(taken)
        self.counts["first"] += sum(map(bool, taken)) - (self.fault == "positions")
        self.counts["second"] += sum(count > 1 for count in taken)
        self.counts["tokens"] += tokens + (self.fault == "others")
        self.counts["prefix_hits"] += self.fault == "prefix"
        if self.fault == "jit" and self.cache is not None:
            self.cache.mkdir(exist_ok=True)
            (self.cache / f"{len(self.seen)}.cubin").touch()


def main(port: str, fault: str = "", cache: str = "") -> None:
    if fault == "dead":
        raise SystemExit("no model here")
    if fault == "cold":  # compiles when it starts, unless it did before
        Path(cache).mkdir(exist_ok=True)
        (Path(cache) / "kernel.cubin").touch()
    with BenchServer(fault, cache=Path(cache) if cache else None, port=int(port)):
        signal.pause()


def serve(model: str, *options: str) -> None:
    """As `vllm serve`."""
    given = dict(option.removeprefix("--").partition("=")[::2] for option in options)
    config = json.loads(given.get("speculative-config", "{}"))
    depth = config.get("num_speculative_tokens", 0)
    exact = Path(model).name == "exact"
    print("INFO 11-30 10:00:00 [cuda.py:422] Using AttentionBackendEnum.TRITON_ATTN backend.")
    with BenchServer(port=int(given["port"]), depth=depth, exact=exact):
        sys.stdout.flush()
        signal.pause()


if __name__ == "__main__":
    serve(*sys.argv[2:]) if sys.argv[1] == "serve" else main(*sys.argv[1:])
