"""Stands for ``vllm serve``: an HTTP server that answers from the known orbit, and can be faulty.

Placed as ``vllm/entrypoints/cli/main.py`` of a package. Where the package's model file has the
fault of the suite's positive control, answers are wrong from the first long prompt on: none is
sent to a server that serves one request at a time.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import vllm

from tests.gpu.models import exact_moe

FAULTY = (
    "plant(Glm4MoE)"
    in (Path(vllm.__file__).parent / "model_executor" / "models" / "glm4_moe.py").read_text()
)
STATE = {"long": 0, "generated": 0, "drafts": 0}
LOCK = threading.Lock()
SHOWN = ("CUDA_VISIBLE_DEVICES", "VLLM_ALLREDUCE_USE_SYMM_MEM")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        text = f"vllm:generation_tokens_total {STATE['generated']}.0\n"
        if any("speculative-config" in word for word in sys.argv):
            for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
                text += f"vllm:spec_decode_{name}_total {STATE['drafts']}.0\n"
            text += (
                'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"} '
                f"{STATE['drafts']}.0\n"
            )
        self._say(text.encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens = exact_moe.orbit(asked["prompt"][-1], asked["max_tokens"])
        choice: dict[str, Any] = {"token_ids": tokens}
        if "prompt_logprobs" in asked:
            choice["prompt_logprobs"] = [None, *map(score, asked["prompt"], asked["prompt"][1:])]
        with LOCK:
            STATE["long"] += len(asked["prompt"]) > 1000
            if FAULTY and STATE["long"]:
                tokens[len(tokens) // 2] = 0
            STATE["generated"] += len(tokens)
            STATE["drafts"] += len(tokens) // 2
        self._say(json.dumps({"choices": [choice]}).encode())

    def _say(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def score(before: int, token: int) -> dict[str, dict[str, float]]:
    right = exact_moe.following(before)
    return {str(right): {"logprob": 0.0}} | (
        {} if token == right else {str(token): {"logprob": -1024.0}}
    )


def say_sums(size: int) -> None:
    """How ranks add up, as vLLM and NCCL say it."""
    names = ["CUSTOM", "PYNCCL"]["--disable-custom-all-reduce" in sys.argv :]
    print(f"INFO Using {names} all-reduce backends (in dispatch order) for group 'tp:0' out of x")
    if os.environ.get("NCCL_DEBUG") == "INFO" and size > 1:
        host = os.environ.get("NCCL_P2P_DISABLE") == "1"
        carrier = "SHM/direct/direct" if host else "P2P/CUMEM"
        print(f"host:1:2 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via {carrier}", flush=True)


class Server(ThreadingHTTPServer):
    request_queue_size = 64


if __name__ == "__main__":
    print("INFO Using 'MARLIN' NvFp4 MoE backend out of potential backends: ['MARLIN'].")
    size = next((word[23:] for word in sys.argv if word.startswith("--tensor-parallel-size=")), 1)
    print(f"Initializing a V1 LLM engine (v0) with config: tensor_parallel_size={size}, x=y")
    print(*sys.argv, *(f"{name}={os.environ.get(name)}" for name in SHOWN), flush=True)
    if "--enforce-eager" not in sys.argv:
        print("INFO Graph capturing finished in 1 secs, took 0.1 GiB", flush=True)
    say_sums(int(size))
    port = next(int(word[7:]) for word in sys.argv if word.startswith("--port="))
    Server(("127.0.0.1", port), Handler).serve_forever()
