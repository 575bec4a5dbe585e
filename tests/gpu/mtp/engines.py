"""Engines and HTTP servers of the MTP tests by name, each in processes of its own."""

from __future__ import annotations

import json
import math
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

from tests.gpu.harness import limits, processes, variants
from tests.gpu.harness.device import parallel_variables, ranks
from tests.gpu.harness.processes import ROOT
from tests.gpu.harness.server import Server
from tests.gpu.harness.spec_metrics import Reading
from tests.gpu.models import exact_mtp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

JOB = "tests.gpu.mtp.engine_job"
REQUESTS, COUNT = 8, 512
VOCABULARY = 512  # of the checkpoint "card"
LENGTHS, EACH = (2_050, 8_200, 32_800), 5  # of long prompts, and how many
RanOf: TypeAlias = "Callable[[str], Ran]"
ServedOf: TypeAlias = "Callable[[str], Served]"
LOOK = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # so that a function can be sent to the worker


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine.

    Attributes:
        draft: ``Variant`` of the exact model; empty for a checkpoint of the bundle.
        checkpoint: name of a checkpoint of the bundle.
        k: speculative tokens; 0 is off.
        lacks: tensors that the checkpoint lacks, by the beginning of their names.
        zeroed: tensors that are zero.
        weights_only: attention projections whose FP8 group has no input activations, by name.
        files: variant of vLLM: empty is the installed one.
        parallel: tensor parallel, over all GPUs of the tier.
        more: arguments of vllm.LLM.
        count: tokens per request.
        asked: how often long prompts are, instead of short ones; all log probabilities are kept.
    """

    draft: Any = ""
    checkpoint: str = ""
    k: int = 1
    lacks: tuple[str, ...] = ()
    zeroed: tuple[str, ...] = ()
    weights_only: str = ""
    files: str = ""
    parallel: bool = False
    more: dict[str, Any] = field(default_factory=dict)
    count: int = COUNT
    asked: int = 0

    @property
    def prompts(self) -> list[list[int]]:
        """Two tokens each: MiMo's head masks the first position. Long ones end alike."""
        if self.asked:
            source = random.Random(1)  # noqa: S311 - not a secret
            lengths = [length for length in LENGTHS for _ in range(EACH)]
            return self.asked * [
                [*(source.randrange(8, VOCABULARY) for _ in range(length - 1)), 8]
                for length in lengths
            ]
        return [[200 + number, last(number)] for number in range(REQUESTS)]


def last(number: int) -> int:
    """Last token of a prompt: a token after which no orbit meets token 0."""
    zero = set(exact_mtp.orbit(0, exact_mtp.CYCLE))
    return [token for token in range(exact_mtp.SIZE) if token not in zero][5 * number]


ATTENTION = "fused_wqa_wkv|wq_a|wkv|wq_b|wo_a|wo_b"
ALL_BUT_WO_A = ATTENTION.replace("wo_a|", "")
DEEPSEEK: dict[str, Any] = {
    "kv_cache_dtype": "fp8",
    "block_size": 256,
    "max_model_len": 1024,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2 << 30,
}
LONG = {**DEEPSEEK, "max_model_len": 36_864, "max_logprobs": VOCABULARY}
WHOLE = {**LONG, "max_num_batched_tokens": 36_864, "max_num_seqs": 1}
CHUNKED = {**LONG, "max_num_batched_tokens": 2_048, "enable_prefix_caching": True}


def card(**more: Any) -> Engine:
    """The tiny DeepSeek-V4 in the card's layout."""
    return Engine(**{"checkpoint": "card", "more": DEEPSEEK, "count": 64, **more})


ENGINES = {
    "plain": Engine(draft="token", k=0),
    "token-1": Engine(draft="token"),
    "token-2": Engine(draft="token", k=2),
    "token-2-graphs": Engine(draft="token", k=2, more={"enforce_eager": False}),
    "hidden-1": Engine(draft="hidden"),
    "hidden-2": Engine(draft="hidden", k=2),
    "wrong-1": Engine(draft="wrong"),
    "fraction-1": Engine(draft="fraction"),
    "fraction-2": Engine(draft="fraction", k=2),
    "zeroed": Engine(draft="token", zeroed=(exact_mtp.INPUT,)),
    "stripped": Engine(draft="token", lacks=(exact_mtp.MTP,)),
    "partly-stripped": Engine(draft="token", lacks=(exact_mtp.INPUT,)),
    "dsv4": card(),
    "dsv4-parallel": card(parallel=True),
    "dsv4-whole": card(more=WHOLE, count=8, asked=1),
    "dsv4-chunked": card(more=CHUNKED, count=8, asked=2),
    "dsv4-published": card(files="published"),
    "dsv4-without-0002": card(files="without-0002"),
    "dsv4-without-0003": card(files="without-0003"),
    "dsv4-weights-only": card(weights_only=ALL_BUT_WO_A),
    "dsv4-weights-only-without-0001": card(weights_only=ALL_BUT_WO_A, files="without-0001"),
    "dsv4-weights-only-wo-a": card(weights_only=ATTENTION),
}


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What came of an engine.

    Attributes:
        draft_dtypes: parameters of the draft model by dtype, where it was asked.
        logprobs: of all tokens after each long prompt, [prompts, vocabulary].
        cached: tokens of each prompt that came from the prefix cache.
        seconds: from its start until it was ready, and until the first token.
        error: the end of the log where it wrote no result.
    """

    engine: Engine
    tokens: list[list[int]]
    reading: Reading | None
    seconds: dict[str, float]
    log: str
    error: str
    draft_dtypes: dict[str, int] = field(default_factory=dict)
    logprobs: list[list[float]] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)

    def require_answers(self) -> Ran:
        """Itself; AssertionError with the end of its log if it answered nothing."""
        assert not self.error, self.error
        return self


def missing(name: str) -> str:
    """What an engine or server lacks to be run, and how to bring it."""
    engine = ENGINES.get(name)
    if engine is None:
        return ""
    if engine.checkpoint and not (ROOT / "checkpoints" / engine.checkpoint).is_dir():
        return (
            f"no checkpoint {engine.checkpoint}: `nox -s forge -- checkpoint fixtures "
            f"{engine.checkpoint} DIR` makes it, --checkpoint {engine.checkpoint}=DIR brings it"
        )
    if engine.files and not (ROOT / "variants" / engine.files).is_dir():
        return f"this bundle has no vLLM {engine.files}: the series has no such patch"
    return ""


def run(name: str, work: Path, logs: Path) -> Ran:
    """Run an engine to its end.

    Raises:
        NotStartedError: it was ended before, and that is no fault of it.
    """
    engine = ENGINES[name]
    job, result, log = work / f"{name}.json", work / f"{name}-result.json", logs / f"{name}.log"
    job.write_text(
        json.dumps(
            {
                "engine": arguments(engine, model(engine, name, work)),
                "prompts": engine.prompts,
                "count": engine.count,
                "look": bool(engine.checkpoint),
                "logprobs": VOCABULARY if engine.asked else None,
            }
        )
    )
    env = {**os.environ, "VLLM_DEEP_GEMM_WARMUP": "skip", **(LOOK if engine.checkpoint else {})}
    env |= parallel_variables() if engine.parallel else {}
    if engine.files:
        over = variants.lay_over(
            variants.installed(), ROOT / "variants" / engine.files, work / f"{name}-vllm"
        )
        env["PYTHONPATH"] = f"{over}{os.pathsep}{env['PYTHONPATH']}"
    argv = [sys.executable, "-m", JOB, str(job), str(result)]
    processes.run(argv, log, env, limits.limit("engine"))
    text = log.read_text(errors="replace")
    if not result.is_file():
        return Ran(
            engine=engine, tokens=[], reading=None, log=text, seconds={},
            error=text[-20000:] or "it printed nothing",
        )  # fmt: skip
    data = json.loads(result.read_text())
    reading = data.pop("reading")
    if reading is not None:
        reading = Reading(**{**reading, "per_position": tuple(reading["per_position"])})
    return Ran(engine=engine, reading=reading, log=text, error="", **data)


def model(engine: Engine, name: str, work: Path) -> Path:
    """Folder of the checkpoint; an exact one is written, another's config may be changed."""
    if engine.checkpoint:
        brought = ROOT / "checkpoints" / engine.checkpoint
        return (
            without_activations(brought, work / f"{name}-model", engine.weights_only)
            if engine.weights_only
            else brought
        )
    return exact_mtp.write(
        work / f"{name}-model", engine.draft, lacks=engine.lacks, zeroed=engine.zeroed
    )


def without_activations(source: Path, target: Path, names: str) -> Path:
    """The checkpoint with these attention projections in a group that has weights only."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    (group,) = [row for row in groups.values() if row["format"] == "float-quantized"]
    rest = [name for name in ATTENTION.split("|") if name not in names.split("|")]
    if rest:
        groups["others"] = {**group, "targets": [_target("|".join(rest))]}
    group |= {"targets": [_target(names)], "input_activations": None}
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target


def _target(names: str) -> str:
    return rf"re:.*\.attn\.({names})$"


def arguments(engine: Engine, folder: Path) -> dict[str, Any]:
    """Arguments of vllm.LLM.

    A fixed KV cache: memory profiling refuses to run where another process frees memory.
    """
    found: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "max_num_seqs": REQUESTS,
        "gpu_memory_utilization": 0.05,
        "kv_cache_memory_bytes": 256 << 20,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    if not engine.checkpoint:
        found["attention_config"] = {"backend": "TRITON_ATTN"}
    if engine.parallel:
        found["tensor_parallel_size"] = ranks()
    if engine.k:
        found["speculative_config"] = {"method": "mtp", "num_speculative_tokens": engine.k}
    return found | engine.more


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Root mean square of the differences of two rows of log probabilities."""
    squares = [(a - b) ** 2 for a, b in zip(one, other, strict=True)]
    return math.sqrt(sum(squares) / len(squares))


def distances(
    whole: Sequence[Sequence[float]], other: Sequence[Sequence[float]]
) -> tuple[float, float]:
    """Medians: between a prompt and itself in ``other``, and between it and the next prompt."""
    following = [*whole[1:], whole[0]]
    itself = median(map(apart, whole, other))
    return itself, median(map(apart, whole, following))


# Servers of the exact model, each asked all that its test reads.
K, CLIENTS = 2, 8
COUNTS = [64, 97, 128, 200, 256, 301, 400, 512]  # clients end at different times
ALONE = 64
SERVE = [
    "--max-model-len=2048", "--max-num-seqs=8", "--kv-cache-memory-bytes=268435456",
    "--gpu-memory-utilization=0.05", "--enforce-eager", "--no-enable-prefix-caching",
    "--attention-backend=TRITON_ATTN",
]  # fmt: skip
# Server -> its further arguments.
SERVERS = {
    "serve-mtp": [f'--speculative-config={{"method":"mtp","num_speculative_tokens":{K}}}'],
    "serve-plain": [],
}


@dataclass(frozen=True, kw_only=True)
class Served:
    """Tokens of a request ``alone``, counters after it; of those ``together``, and after them."""

    alone: list[int]
    before: Reading | None
    together: list[list[int]]
    after: Reading | None


def serve(name: str, work: Path, logs: Path) -> Served:
    """Start a server, ask it, end it; raises what ``Server`` does."""
    model = exact_mtp.write(work / f"{name}-model", "fraction")
    server = Server(model=model, arguments=[*SERVE, *SERVERS[name]], log=logs / f"{name}.log")
    with server:
        # Counters do not start at zero on a server that lives: only what is added counts.
        alone = server.complete([200, last(0)], ALONE)
        before = server.reading(len(alone))
        if not SERVERS[name]:
            return Served(alone=alone, before=before, together=[], after=None)
        prompts = [[200 + number, last(number)] for number in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            together = list(pool.map(server.complete, prompts, COUNTS))
        after = server.reading(len(alone) + sum(COUNTS))
    return Served(alone=alone, before=before, together=together, after=after)
