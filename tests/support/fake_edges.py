"""A ``vllm serve`` without a model, for tier edges: it refuses, fills memory, and is loaded.

Written as ``vllm/entrypoints/cli/main.py`` where a test wants one, with ``fake_rehearsal``, whose
faults it has too (``leak``, ``immortal``). Further ones: ``lenient`` (it serves what it should
refuse), ``fits`` and ``crowded`` (more or less room than there is), ``lighter`` (dummy weights are
smaller), ``captured`` (all batches have graphs), and, from the first malformed request on,
``accepts`` (they are answered), ``errors`` (in the log), ``drifts`` (other answers), ``grows``.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
from pathlib import Path
from threading import Condition, Thread
from typing import Any

from tests.gpu.edges.load import DECODED, LONG
from tests.gpu.edges.rows import CARD, GRAPHS, REFUSALS
from tests.support import fake_rehearsal
from tests.support.fake_rehearsal import CONFIG, COUNTS, FAULTS, LOCK, answer

GIB, TOTAL = 1 << 30, 143156 << 20
WEIGHTS, OTHER = 84.99, 2.0  # GiB
QUIET_S = 0.3  # a batch is complete when nobody came for so long
POLL_S = 0.05
LOADED = "INFO [gpu_model_runner.py:5347] Model loading took {} GiB memory and 60.0 seconds"
START = """
INFO [gpu_worker.py:560] Available KV cache memory: {left:.2f} GiB
INFO [kv_cache_utils.py:2178] Maximum concurrency for {length:,} tokens per request: 1.80x
INFO [gpu_worker.py:857] Desired GPU memory utilization is ({share}, {requested:.2f} GiB). \
Actual usage is 84.99 GiB
"""
BATCH: set[int] = set()
ARRIVED = Condition()
GROWN: list[bytes] = []
STATE = {"malformed": 0}


def refuse(says: str) -> None:
    print(f"ValueError: {says}", flush=True)
    sys.exit(1)


def start() -> None:
    """Print what a start says, or what refuses it."""
    for row in REFUSALS:
        if {*row.arguments} <= {*sys.argv} and CONFIG.items() >= row.config.items():
            refuse(row.says) if "lenient" not in FAULTS else None
            return
    option = "--gpu-memory-utilization="
    share = next(float(word.removeprefix(option)) for word in sys.argv if word.startswith(option))
    requested = share * TOTAL / GIB
    dummy = "--load-format=dummy" in sys.argv
    weights = WEIGHTS - 3 * ("lighter" in FAULTS and dummy)
    left = requested - weights - OTHER - 9 * ("crowded" in FAULTS)
    print(LOADED.format(weights), flush=True)
    if left <= 0 and "fits" not in FAULTS:
        refuse("No available memory for the cache blocks. Try increasing")
    length = CARD["max_model_len"]
    print(START.format(left=left, length=length, share=share, requested=requested), flush=True)


def status_of(data: bytes) -> tuple[int, dict[str, Any]]:
    """How a request is answered, and its fields."""
    try:
        body = dict(json.loads(data))
    except ValueError:
        return 400, {}
    prompt, tokens = body["prompt"], body.get("max_tokens", 16)
    if body["model"] != "m":
        return 404, body
    known = isinstance(prompt, list) and max(prompt) < CONFIG["vocab_size"] and tokens > 0
    fits = known and len(prompt) + tokens <= CARD["max_model_len"]
    return (200 if fits else 400), body


def decode() -> None:
    """Wait for a batch to be complete; the last one of it says how it ran."""
    with ARRIVED:
        number = len(BATCH)
        BATCH.add(number)
        ARRIVED.notify_all()
        while ARRIVED.wait(QUIET_S):
            pass
        if BATCH:
            tokens = len(BATCH) * GRAPHS["tokens_per_sequence"]
            eager = tokens > max(GRAPHS["sizes"]) and "captured" not in FAULTS
            mode = "NONE" if eager else "FULL"
            print(f"INFO | {tokens}      | {tokens} | 0 | {mode}   | {DECODED} |", flush=True)
            BATCH.clear()


class Handler(fake_rehearsal.Handler):
    def do_GET(self) -> None:
        rows = {"num_requests_running{engine=\"0\"}": COUNTS["running"],
                "num_requests_waiting{engine=\"0\"}": 0}  # fmt: skip
        self.send("".join(f"vllm:{name} {value}\n" for name, value in rows.items()))

    def do_POST(self) -> None:
        status, body = status_of(self.rfile.read(int(self.headers["Content-Length"])))
        if status != 200:
            self.malformed(status)
        elif body.get("stream"):
            self.stream()
        elif body["max_tokens"] == LONG:
            self.wait_for_client()
        else:
            if body["max_tokens"] == DECODED:
                decode()
            text = answer(body)
            if "drifts" in FAULTS and STATE["malformed"]:
                text["choices"][0]["logprobs"]["token_logprobs"][0] -= 0.2
            self.send(json.dumps(text))

    def malformed(self, status: int) -> None:
        first, STATE["malformed"] = not STATE["malformed"], 1
        if first and "errors" in FAULTS:
            print("ERROR:    Exception in ASGI application", flush=True)
        if first and "grows" in FAULTS:
            GROWN.append(bytes(range(256)) * (1 << 19))
            used = Path(__file__).parents[3] / "used"
            used.write_text("99000\n")
        self.send_response(200 if "accepts" in FAULTS else status)
        self.end_headers()

    def wait_for_client(self) -> None:
        """Answer nothing until the client is gone."""
        with LOCK:
            COUNTS["running"] += 1
        while not select.select([self.connection], [], [], POLL_S)[0]:
            pass
        self.close_connection = True
        if "leak" not in FAULTS:
            with LOCK:
                COUNTS["running"] -= 1


if __name__ == "__main__":
    start()
    fake_rehearsal.SPECULATIVE.clear()  # no draft is accepted at a declared rate
    port = next(int(word.partition("=")[2]) for word in sys.argv if word.startswith("--port="))
    argv = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as child:
        Thread(target=fake_rehearsal.watch, args=(child,), daemon=True).start()
        print(f"(Worker_TP1 pid={child.pid}) INFO ready", flush=True)
        fake_rehearsal.Server(("127.0.0.1", port), Handler).serve_forever()
