"""``vllm serve`` as a process: start, wait until it answers, ask, read its counters, end it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.gpu.harness import limits, processes
from tests.gpu.harness.spec_metrics import Reading, read_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


POLL_S = 0.25
GENERATED = "vllm:generation_tokens_total"


class ServerEndedError(RuntimeError):
    """The server ended, or hangs; the end of its log is the message."""


@dataclass(kw_only=True)
class Server:
    """A running server; a context manager.

    Attributes:
        log: file for all that it prints.
        variables: more environment.
        kind: what of ``limits`` it is until it is healthy.
        answer_s: time that one request may take.
    """

    model: Path
    arguments: Sequence[str]
    log: Path
    variables: dict[str, str] = field(default_factory=dict)
    kind: str = "server"
    answer_s: float = 180

    def __enter__(self) -> Server:
        """Start it and wait until it is healthy.

        Raises:
            ServerEndedError: it ended, or hangs.
            NotStartedError: it takes too long, and that is no fault of it.
        """
        # Held while the server lives, which may bind it too: many start at a time, for a minute.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self.port = self._place.getsockname()[1]
        argv = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self.model),
            "--host=127.0.0.1", f"--port={self.port}", "--served-model-name=m", *self.arguments,
        ]  # fmt: skip
        with contextlib.ExitStack() as started:
            started.callback(self._place.close)
            self.process = processes.start(argv, self.log, {**os.environ, **self.variables})
            started.callback(processes.end, self.process, signal.SIGTERM, signal.SIGKILL)
            self._wait()
            self._started = started.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """End it and all that it started."""
        self._started.close()

    def complete(self, prompt: Sequence[int], count: int) -> list[int]:
        """Token ids of a greedy completion of exactly ``count`` tokens."""
        answer = self.post(
            "/v1/completions",
            {
                "model": "m", "prompt": list(prompt), "max_tokens": count, "temperature": 0,
                "ignore_eos": True, "return_token_ids": True,
            },
        )  # fmt: skip
        return list(answer["choices"][0]["token_ids"])

    def scores(self, tokens: Sequence[int]) -> tuple[list[float], list[float]]:
        """Score a finished sequence by prefill: the input of ``corruption.impossible``.

        Returns:
            Log probability of each token but the first, and the greatest at each position.
        """
        answer = self.post(
            "/v1/completions",
            {
                "model": "m", "prompt": list(tokens), "max_tokens": 1, "temperature": 0,
                "ignore_eos": True, "prompt_logprobs": 1,
            },
        )  # fmt: skip
        rows = answer["choices"][0]["prompt_logprobs"][1:]  # the first token has none
        given = [row[str(token)]["logprob"] for row, token in zip(rows, tokens[1:], strict=True)]
        return given, [max(entry["logprob"] for entry in row.values()) for row in rows]

    def metrics(self) -> str:
        """The text of ``/metrics``."""
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=30) as reply:  # noqa: S310
            return bytes(reply.read()).decode()

    def reading(self, generated: int) -> Reading | None:
        """The counters of speculation, once ``generated`` tokens are counted.

        An answer may be sent before the step that made it is counted.

        Raises:
            TimeoutError: so many are never counted.
        """
        end = time.monotonic() + 30
        while True:
            text = self.metrics()
            if sum(_values(text, GENERATED)) >= generated:
                return read_text(text)
            if time.monotonic() > end:
                raise TimeoutError(f"{generated} tokens came back, {GENERATED} stays below")
            time.sleep(POLL_S)

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _wait(self) -> None:
        limit = limits.limit(self.kind)
        end = time.monotonic() + limit.seconds
        while True:
            if self.process.poll() is not None:
                raise ServerEndedError(f"exit {self.process.returncode}: {self._tail()}")
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=5):  # noqa: S310
                    return
            except (urllib.error.URLError, OSError):
                if time.monotonic() > end:
                    limit.check(self.log.stem)
                    raise ServerEndedError(
                        f"no answer in {limit.seconds:.0f} s: {self._tail()}"
                    ) from None
            time.sleep(POLL_S)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send JSON and return the JSON that is answered."""
        request = urllib.request.Request(  # noqa: S310
            self._url + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=self.answer_s) as reply:  # noqa: S310
            return json.load(reply)

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def _values(text: str, name: str) -> list[float]:
    return [
        float(row.rsplit(" ", 1)[1])
        for row in text.splitlines()
        if row.startswith((f"{name} ", f"{name}{{"))
    ]
