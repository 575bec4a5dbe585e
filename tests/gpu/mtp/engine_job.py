"""Run one engine on fixed prompts and write what it returned and counted. A process of its own.

    python -m tests.gpu.mtp.engine_job JOB.json RESULT.json

JOB: ``engine`` (arguments of vllm.LLM), ``prompts`` (lists of token ids), ``count`` (tokens each),
``look`` (whether to say which dtypes the draft model's parameters have), and ``logprobs`` (how many
are kept of the first token after each prompt).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.gpu.harness.spec_metrics import read_snapshot


def draft_dtypes(worker: Any) -> dict[str, int]:
    """Parameters of the draft model by dtype; runs in the worker."""
    runner = worker.model_runner
    drafter = getattr(runner, "drafter", None) or runner.speculator
    return dict(Counter(str(p.dtype).rpartition(".")[2] for p in drafter.model.parameters()))


def sampling(kind: Any, count: int, logprobs: int | None = None) -> Any:
    """Greedy, of exactly so many tokens."""
    return kind(
        temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=logprobs
    )


def main(job_path: str, result_path: str) -> None:
    start = time.monotonic()
    job = json.loads(Path(job_path).read_text())
    from vllm import LLM, SamplingParams

    llm = LLM(disable_log_stats=False, **job["engine"])
    ready = time.monotonic() - start
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    if job["look"]:  # how long the first token takes where kernels are compiled for it
        llm.generate(prompts[:1], sampling(SamplingParams, 1), use_tqdm=False)
    first = time.monotonic() - start
    greedy = sampling(SamplingParams, job["count"], job["logprobs"])
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    reading = read_snapshot(llm.get_metrics())
    result = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "reading": None if reading is None else vars(reading),
        "seconds": {"ready": ready, "first token": first} if job["look"] else {"ready": ready},
    }
    if job["logprobs"]:
        rows = [output.outputs[0].logprobs[0] for output in outputs]
        result["logprobs"] = [[row[token].logprob for token in sorted(row)] for row in rows]
        result["cached"] = [output.num_cached_tokens for output in outputs]
    if job["look"]:
        result["draft_dtypes"] = llm.collective_rpc(draft_dtypes)[0]
    Path(result_path).write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # what is to be said is written; an engine that hangs at its end says nothing


if __name__ == "__main__":
    main(*sys.argv[1:])
