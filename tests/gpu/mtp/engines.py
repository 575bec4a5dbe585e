"""Engines of the MTP tests by name, each run in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.gpu.harness import variants
from tests.gpu.harness.spec_metrics import Reading
from tests.gpu.models import exact_mtp

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = Path(__file__).with_name("engine_job.py")
ROOT = Path(__file__).parents[3]
REQUESTS, COUNT = 8, 512
PATIENCE_S, RESERVE_S = 420, 20
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
        more: arguments of vllm.LLM.
        count: tokens per request.
    """

    draft: Any = ""
    checkpoint: str = ""
    k: int = 1
    lacks: tuple[str, ...] = ()
    zeroed: tuple[str, ...] = ()
    weights_only: str = ""
    files: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    count: int = COUNT

    @property
    def prompts(self) -> list[list[int]]:
        """Two tokens each: MiMo's head masks the first position."""
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
ENGINES = {
    "plain": Engine(draft="token", k=0),
    "token-1": Engine(draft="token", k=1),
    "token-2": Engine(draft="token", k=2),
    "token-2-graphs": Engine(draft="token", k=2, more={"enforce_eager": False}),
    "hidden-1": Engine(draft="hidden", k=1),
    "hidden-2": Engine(draft="hidden", k=2),
    "wrong-1": Engine(draft="wrong", k=1),
    "fraction-1": Engine(draft="fraction", k=1),
    "fraction-2": Engine(draft="fraction", k=2),
    "zeroed": Engine(draft="token", k=1, zeroed=(exact_mtp.INPUT,)),
    "stripped": Engine(draft="token", k=1, lacks=(exact_mtp.MTP,)),
    "partly-stripped": Engine(draft="token", k=1, lacks=(exact_mtp.INPUT,)),
    "dsv4": Engine(checkpoint="card", k=1, more=DEEPSEEK, count=64),
    "dsv4-published": Engine(checkpoint="card", k=1, more=DEEPSEEK, count=64, files="published"),
    "dsv4-without-0002": Engine(
        checkpoint="card", k=1, more=DEEPSEEK, count=64, files="without-0002"
    ),
    "dsv4-without-0003": Engine(
        checkpoint="card", k=1, more=DEEPSEEK, count=64, files="without-0003"
    ),
    "dsv4-weights-only": Engine(
        checkpoint="card", k=1, more=DEEPSEEK, count=64, weights_only=ALL_BUT_WO_A
    ),
    "dsv4-weights-only-without-0001": Engine(
        checkpoint="card",
        k=1,
        more=DEEPSEEK,
        count=64,
        weights_only=ALL_BUT_WO_A,
        files="without-0001",
    ),
    "dsv4-weights-only-wo-a": Engine(
        checkpoint="card", k=1, more=DEEPSEEK, count=64, weights_only=ATTENTION
    ),
}


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What came of an engine.

    Attributes:
        engine: which.
        tokens: of each request.
        reading: its counters.
        draft_dtypes: parameters of the draft model by dtype, where it was asked.
        seconds: from its start until it was ready, and until the first token.
        log: all that it printed.
        error: the end of the log where it wrote no result.
    """

    engine: Engine
    tokens: list[list[int]]
    reading: Reading | None
    draft_dtypes: dict[str, int]
    seconds: dict[str, float]
    log: str
    error: str


def run(name: str, work: Path, logs: Path) -> Ran:
    """Run an engine to its end."""
    engine = ENGINES[name]
    job, result, log = work / f"{name}.json", work / f"{name}-result.json", logs / f"{name}.log"
    job.write_text(
        json.dumps(
            {
                "engine": arguments(engine, model(engine, name, work)),
                "prompts": engine.prompts,
                "count": engine.count,
                "look": bool(engine.checkpoint),
            }
        )
    )
    env = {**os.environ, "VLLM_DEEP_GEMM_WARMUP": "skip", **(LOOK if engine.checkpoint else {})}
    if engine.files:
        over = variants.lay_over(
            variants.installed(), ROOT / "variants" / engine.files, work / f"{name}-vllm"
        )
        env["PYTHONPATH"] = f"{over}{os.pathsep}{env['PYTHONPATH']}"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(job), str(result)],
            stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True,
        )  # fmt: skip
        with _running(process):
            try:
                process.wait(timeout=_patience())
            except subprocess.TimeoutExpired:
                out.write(b"\nit was ended: it took too long\n")
    text = log.read_text(errors="replace")
    if not result.is_file():
        return Ran(
            engine=engine, tokens=[], reading=None, draft_dtypes={}, log=text, seconds={},
            error=text[-20000:] or "it printed nothing",
        )  # fmt: skip
    data = json.loads(result.read_text())
    reading = data["reading"]
    if reading is not None:
        reading = Reading(**{**reading, "per_position": tuple(reading["per_position"])})
    return Ran(
        engine=engine, tokens=data["tokens"], reading=reading, log=text, error="",
        draft_dtypes=data.get("draft_dtypes", {}), seconds=data["seconds"],
    )  # fmt: skip


def _patience() -> float:
    """What the budget leaves, if it is less."""
    # Not above: pytest must import a plugin before a conftest does.
    from tests.gpu.harness.plugin import DEADLINE

    left = float(os.environ.get(DEADLINE, "inf")) - time.time() - RESERVE_S
    return max(1.0, min(PATIENCE_S, left))


_PROCESSES: set[int] = set()
_LOCK, _ENDED = threading.Lock(), threading.Event()


@contextlib.contextmanager
def _running(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a process and all that it started, at the latest when ``end_all`` is called."""
    with _LOCK:
        _PROCESSES.add(process.pid)
        if _ENDED.is_set():
            _kill(process.pid)
    try:
        yield
    finally:
        with _LOCK:
            _PROCESSES.discard(process.pid)
            _kill(process.pid)
        process.wait()


def end_all() -> None:
    """End whatever runs, and what is begun later: the tests were interrupted."""
    with _LOCK:
        _ENDED.set()
        for leader in _PROCESSES:
            _kill(leader)


def _kill(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it and all its children have ended
        os.killpg(leader, signal.SIGKILL)


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
    if engine.k:
        found["speculative_config"] = {"method": "mtp", "num_speculative_tokens": engine.k}
    return found | engine.more
