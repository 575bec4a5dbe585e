"""What a server of an artifact's size says of its start, and how fast it answers.

The texts are those of vLLM 0.22.1 to 0.33.0; what a log does not say is absent, never guessed. Of
the ranks, the first one of a host alone logs them (0.26.0, logger.py:127, scope="local").
"""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from tests.gpu.harness.device import query
from tests.gpu.rehearsal.expected import ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.gpu.harness.server import Server

# 0.26.0: model_loader/default_loader.py:431, v1/worker/gpu_model_runner.py:5348 and 6845 (v2:
# gpu/model_runner.py:306, 748), v1/worker/gpu_worker.py:561, v1/core/kv_cache_utils.py:2177-2179,
# v1/engine/core.py:348.
START = {
    "load_s": r"Loading weights took ([\d.]+) seconds",
    "weights_gib": r"Model loading took ([\d.]+) GiB",
    "kv_cache_gib": r"Available KV cache memory: ([\d.]+) GiB",
    "kv_cache_tokens": r"GPU KV cache size: ([\d,]+) tokens",
    "max_model_len": r"Maximum concurrency for ([\d,]+) tokens per request",
    "concurrency": r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x",
    "capture_s": r"Graph capturing finished in (\d+) secs",
    "graphs_gib": r"Graph capturing finished in \d+ secs, took (-?[\d.]+) GiB",
    "init_s": r"init engine \(profile, create kv cache, warmup model\) took ([\d.]+) s",
}
# Prefix of what a worker prints (utils/system_utils.py, _add_prefix).
WORKER = re.compile(r"\(Worker\w* pid=(\d+)\)")
RUNNING = "vllm:num_requests_running"
CACHES = "VLLM_CACHE_ROOT"  # beside the other compilers' folders, see harness.run
SEED = 20261130
IDS = range(1000, ROWS)
PROMPT, ANSWER = 256, 128  # tokens
ROUNDS = 2  # answers that each client waits for
ATTEMPTS = 8  # until a measurement compiles nothing
FIRST_TOKENS = 5
STREAMED = 4096  # tokens of an answer that nobody waits for
SHIFT = 0.05  # what rounding may change of a log probability
POLL_S = 0.25
FREED_S, ENDED_S = 60, 180  # until a place is free, until a server ended


def start_facts(log: str) -> dict[str, list[float]]:
    """Name of ``START`` -> its values, in the order of the log; names that it lacks are absent."""
    found = {
        name: [float(value.replace(",", "")) for value in re.findall(pattern, log)]
        for name, pattern in START.items()
    }
    return {name: values for name, values in found.items() if values}


def workers(log: str) -> list[int]:
    """Process ids of the workers that printed something."""
    return sorted({int(pid) for pid in WORKER.findall(log)})


def memory_used() -> list[int]:
    """MiB in use on every GPU of the host."""
    return [int(used) for (used,) in query("memory.used")]


def compiled_files() -> dict[str, int]:
    """Compiler -> files in its cache; empty where the run keeps none."""
    if not (one := os.environ.get(CACHES)):
        return {}
    return {
        folder.name: sum(path.is_file() for path in folder.rglob("*"))
        for folder in sorted(Path(one).parent.iterdir())
        if folder.is_dir()
    }


def prompts(count: int, length: int = PROMPT, seed: int = SEED) -> list[list[int]]:
    """Prompts of token ids, always the same."""
    source = random.Random(seed)  # noqa: S311 - not a secret
    return [[source.choice(IDS) for _ in range(length)] for _ in range(count)]


def speed(server: Server, together: int) -> dict[str, float]:
    """Tokens per second of so many clients, while nothing is compiled.

    TileLang compiles kernels for the number of tokens of a step when one comes (on H200, 10 to 15 s
    each): such attempts are not counted. Their number is recorded. No prompt was asked before.
    """
    for attempt in range(ATTEMPTS):
        asked = prompts(together * ROUNDS, seed=SEED + together * ATTEMPTS + attempt)
        before, begin = compiled_files(), time.monotonic()
        with ThreadPoolExecutor(together) as pool:
            answers = list(pool.map(lambda prompt: server.complete(prompt, ANSWER), asked))
        seconds = time.monotonic() - begin
        if attempt and compiled_files() == before:
            tokens = sum(map(len, answers))
            return {"tokens_per_s": round(tokens / seconds, 1), "not_counted": attempt}
    raise AssertionError(f"kernels were compiled in {ATTEMPTS} attempts of {together} clients")


def first_token_s(server: Server) -> float:
    """Median time of an answer of one token, HTTP included."""
    times = []
    for prompt in prompts(FIRST_TOKENS):
        begin = time.monotonic()
        server.complete(prompt, 1)
        times.append(time.monotonic() - begin)
    return round(statistics.median(times), 4)


def best(server: Server, prompt: Sequence[int]) -> tuple[int, float]:
    """The next token, and its log probability."""
    body = {"model": "m", "prompt": list(prompt), "max_tokens": 1, "temperature": 0, "logprobs": 1}
    body |= {"ignore_eos": True, "return_token_ids": True}
    choice = server.post("/v1/completions", body)["choices"][0]
    return choice["token_ids"][0], float(choice["logprobs"]["token_logprobs"][0])


def require_same_twice(server: Server, prompt: Sequence[int]) -> None:
    """Fail unless the next token comes again, and its log probability is finite both times.

    It was asked before, so that both find the prompt in the prefix cache: batches of other shapes
    round in another way.
    """
    _, first, again = (best(server, prompt) for _ in range(3))
    for token, value in (first, again):
        assert math.isfinite(value), f"log probability of token {token} is {value}"
    assert first[0] == again[0], f"first {first}, then {again}"
    assert abs(first[1] - again[1]) <= SHIFT, f"first {first}, then {again}"


def synthetic(arguments: Sequence[str], rate: float) -> list[str]:
    """Arguments of ``vllm serve`` whose drafts are accepted at random, each at that rate.

    ``synthetic_acceptance_rates`` are those of the first i + 1 tokens together (0.26.0,
    config/speculative.py:224).
    """
    option, changed = "--speculative-config=", []
    for word in arguments:
        if word.startswith(option):
            config = json.loads(word.removeprefix(option))
            k = config["num_speculative_tokens"]
            config["rejection_sample_method"] = "synthetic"
            config["synthetic_acceptance_rates"] = [rate ** (i + 1) for i in range(k)]
            changed.append(option + json.dumps(config))
        else:
            changed.append(word)
    return changed


def vanish(server: Server) -> None:
    """Ask for a long answer, and go when it begins."""
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=server.answer_s)
    body = {"model": "m", "prompt": prompts(1)[0], "max_tokens": STREAMED, "stream": True}
    headers = {"Content-Type": "application/json"}
    client.request("POST", "/v1/completions", json.dumps(body | {"ignore_eos": True}), headers)
    client.getresponse().read(1)
    client.close()


def running(server: Server) -> float:
    """Requests that the server computes now."""
    rows = [row for row in server.metrics().splitlines() if row.startswith(RUNNING)]
    if not rows:
        raise LookupError(f"{RUNNING} is not exported")
    return sum(float(row.rsplit(" ", 1)[1]) for row in rows)
