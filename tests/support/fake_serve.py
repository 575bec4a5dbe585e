"""A ``vllm serve`` that has no model: answers, counts and scores as its config.json says.

Written as ``vllm/entrypoints/cli/main.py`` where a test wants one; standard library only.

``rates``: path -> share of drafts that are accepted, for k = 1. ``impossible``: positions from the
end of a scored sequence that get a log probability far below the best. ``silent``: no counters.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

MODEL = Path(sys.argv[2])
CONFIG: dict[str, Any] = json.loads((MODEL / "config.json").read_text())
COUNTS = {"generation_tokens": 0, "drafts": 0, "accepted": 0}
LOCK = Lock()
PREFIX = "vllm:spec_decode_num_"


def count(tokens: int, rate: float) -> None:
    """One token comes of the prompt, the others of drafts: each gives one and what it had right."""
    drafts = round((tokens - 1) / (1 + rate))
    with LOCK:
        COUNTS["generation_tokens"] += tokens
        COUNTS["drafts"] += drafts
        COUNTS["accepted"] += tokens - 1 - drafts


def metrics() -> str:
    """As vLLM exports them."""
    rows = {"vllm:generation_tokens_total": COUNTS["generation_tokens"]}
    if not CONFIG.get("silent"):
        rows |= {
            f"{PREFIX}drafts_total": COUNTS["drafts"],
            f"{PREFIX}draft_tokens_total": COUNTS["drafts"],
            f"{PREFIX}accepted_tokens_total": COUNTS["accepted"],
            f'{PREFIX}accepted_tokens_per_pos_total{{position="0"}}': COUNTS["accepted"],
        }
    return "".join(f"{name} {value}\n" for name, value in rows.items())


def scored(prompt: list[int]) -> dict[str, Any]:
    """Log probabilities of a prompt: of the token that is there, and of a better one."""
    rows: list[dict[str, Any] | None] = [None]
    for place, token in enumerate(prompt[1:], 1):
        here = -9.0 if len(prompt) - place in CONFIG.get("impossible", []) else -0.1
        rows.append({str(token): {"logprob": here}, "-1": {"logprob": -0.1}})
    return {"choices": [{"prompt_logprobs": rows}]}


def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A completion or a chat."""
    if "prompt_logprobs" in body:
        return scored(body["prompt"])
    tokens = list(range(body["max_tokens"]))
    count(len(tokens), CONFIG["rates"][path])
    if "messages" in body:
        if "thinking" not in body["chat_template_kwargs"]:
            raise ValueError("does it think?")
        choice: dict[str, Any] = {"message": {"content": "Yes."}, "token_ids": tokens}
        return {"choices": [choice], "prompt_token_ids": [1, 2, 3]}
    prompt = body["prompt"] if isinstance(body["prompt"], list) else [1, 2, 3]
    return {"choices": [{"text": "Yes.", "token_ids": tokens, "prompt_token_ids": prompt}]}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._send(metrics() if self.path == "/metrics" else "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(json.dumps(answer(self.path, body)))

    def _send(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nothing: the log of a server is read."""


class Server(ThreadingHTTPServer):
    request_queue_size = 64


if __name__ == "__main__":
    port = next(int(word.partition("=")[2]) for word in sys.argv if word.startswith("--port="))
    print("INFO: a server without a model", flush=True)
    Server(("127.0.0.1", port), Handler).serve_forever()
