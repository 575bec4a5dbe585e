"""A ``vllm serve`` without a model, for tier rehearsal: each token follows from the one before.

Written as ``vllm/entrypoints/cli/main.py`` where a test wants one.
``faults`` in the config.json of the model: ``context`` (answers depend on the whole prompt),
``leak`` (a client that goes keeps its place), ``immortal`` (it survives its worker), ``silent`` (of
its start), ``rejects`` (fewer drafts are accepted than declared), ``unlikely`` (other log
probabilities).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from tests.gpu.rehearsal.expected import ROWS, Expected

CONFIG: dict[str, Any] = json.loads((Path(sys.argv[2]) / "config.json").read_text())
EXPECTED = Expected(Path(sys.argv[2]))
FAULTS: list[str] = CONFIG["faults"]
SPECULATIVE = [word for word in sys.argv if word.startswith("--speculative-config=")]
COUNTS = {"generated": 0, "drafts": 0, "accepted": 0, "running": 0}
LOCK = Lock()
START = """
INFO [default_loader.py:431] Loading weights took 71.20 seconds
INFO [gpu_model_runner.py:5348] Model loading took 84.21 GiB memory and 99.100000 seconds
INFO [gpu_worker.py:561] Available KV cache memory: 31.5 GiB
INFO [kv_cache_utils.py:2177] GPU KV cache size: 2,113,290 tokens
INFO [kv_cache_utils.py:2178] Maximum concurrency for 1,048,576 tokens per request: 2.02x
INFO [gpu_model_runner.py:6845] Graph capturing finished in 21 secs, took 1.35 GiB
INFO [core.py:348] init engine (profile, create kv cache, warmup model) took 125.15 s
"""


@cache
def follow(token: int) -> tuple[int, float]:
    """The most likely token after another, and its log probability."""
    values = EXPECTED.log_probabilities(token)
    return int(values.argmax()), float(values.max())


def answer(body: dict[str, Any]) -> dict[str, Any]:
    prompt, value = body["prompt"], 0.0
    tokens = [prompt[0]]
    if body["max_tokens"] == 1:  # else it only matters that they come again
        tokens[0], value = follow(sum(prompt) % ROWS if "context" in FAULTS else prompt[-1])
    while len(tokens) < body["max_tokens"]:
        tokens.append((tokens[-1] * 5 + 3) % ROWS)
    with LOCK:
        COUNTS["generated"] += len(tokens)
        if SPECULATIVE:
            config = json.loads(SPECULATIVE[0].partition("=")[2])
            rate = config["synthetic_acceptance_rates"][0] - 0.2 * ("rejects" in FAULTS)
            COUNTS["drafts"] += len(tokens)
            COUNTS["accepted"] = round(rate * COUNTS["drafts"])
    logprobs = {"token_logprobs": [value - 0.2 * ("unlikely" in FAULTS)]}
    return {"choices": [{"token_ids": tokens, "logprobs": logprobs}]}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        rows = {"generation_tokens_total": COUNTS["generated"]}
        rows["num_requests_running"] = COUNTS["running"]
        if SPECULATIVE:
            rows |= {
                "spec_decode_num_drafts_total": COUNTS["drafts"],
                "spec_decode_num_draft_tokens_total": COUNTS["drafts"],
                "spec_decode_num_accepted_tokens_total": COUNTS["accepted"],
                'spec_decode_num_accepted_tokens_per_pos_total{position="0"}': COUNTS["accepted"],
            }
        self.send("".join(f"vllm:{name} {value}\n" for name, value in rows.items()))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("stream"):
            self.stream()
        else:
            self.send(json.dumps(answer(body)))

    def stream(self) -> None:
        with LOCK:
            COUNTS["running"] += 1
        try:
            self.send("data: {}\n\n" * 1000)
            while True:
                self.wfile.write(b"data: {}\n\n" * 1000)
        except OSError:
            self.close_connection = True
        if "leak" not in FAULTS:
            with LOCK:
                COUNTS["running"] -= 1

    def send(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nothing: the log of a server is read."""


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True


def watch(worker: subprocess.Popen[bytes]) -> None:
    worker.wait()
    if "immortal" not in FAULTS:
        print("ERROR Worker proc VllmWorker-1 died unexpectedly, shutting down", flush=True)
        os._exit(0)


if __name__ == "__main__":
    port = next(int(word.partition("=")[2]) for word in sys.argv if word.startswith("--port="))
    argv = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as child:
        Thread(target=watch, args=(child,), daemon=True).start()
        print(f"(Worker_TP1 pid={child.pid}) INFO ready", flush=True)
        print("" if "silent" in FAULTS else START, flush=True)
        Server(("127.0.0.1", port), Handler).serve_forever()
