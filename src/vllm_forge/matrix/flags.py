"""Flags of ``vllm serve`` that decide more than vLLM's own behaviour: GPUs, memory, ports.

Names and short forms: vLLM 0.26.0, vllm/engine/arg_utils.py:976-1102 (0.22.1 and 0.33.0 alike).
Its parser takes underscores for dashes, and the start of a name where it is the only one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_forge.errors import UsageError
from vllm_forge.matrix.errors import MultiNodeError

SHORT = {
    "-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size", "-pcp": "--prefill-context-parallel-size",
    "-n": "--nnodes", "-r": "--node-rank",
    "-dpl": "--data-parallel-size-local", "-dpa": "--data-parallel-address",
    "-dpp": "--data-parallel-rpc-port", "-dpn": "--data-parallel-rank",
    "-dpr": "--data-parallel-start-rank", "-dph": "--data-parallel-hybrid-lb",
    "-dpe": "--data-parallel-external-lb", "-dpm": "--data-parallel-multi-port-external-lb",
    "-sc": "--speculative-config",
}  # fmt: skip
SIZES = {
    "tensor": "tensor-parallel-size", "pipeline": "pipeline-parallel-size",
    "context": "prefill-context-parallel-size", "data": "data-parallel-size",
}  # fmt: skip
LENGTH, UTILIZATION = "--max-model-len", "--gpu-memory-utilization"
SPECULATION, NAME = "--speculative-config", "--served-model-name"
# The method and the number of drafted tokens, where they are given by themselves (ibid., 1750).
METHOD, TOKENS = "--spec-method", "--spec-tokens"
# Method -> what is stored as mtp.*; others draft without it. config/speculative.py:686.
DRAFTERS = {"mtp": "mtp", "deepseek_mtp": "mtp", "dspark": "dspark"}
KV_CACHE = ("--kv-cache-dtype", "--block-size")
# One server of several hosts, or one of several processes that share a model.
MULTI_NODE = (
    "--nnodes", "--node-rank", "--master-addr", "--master-port", "--headless",
    *(f"--data-parallel-{name}" for name in (
        "address", "rpc-port", "rank", "start-rank", "hybrid-lb", "external-lb",
        "multi-port-external-lb")),
)  # fmt: skip
# With them, weights or KV cache are not where or as large as memory.py counts them.
ELSEWHERE = ("--cpu-offload-gb", "--offload-backend", "--kv-cache-memory-bytes",
             "--num-gpu-blocks-override", "--enable-eplb", "--hf-overrides")  # fmt: skip
# What would contradict the container around vLLM, or show a key in the list of processes.
OURS = {
    "--port": "give --port before --", "--model": "give --model or --artifact before --",
    "--api-key": "give --api-key-file before --: arguments are seen by every user of the host",
    "--hf-token": "give --env HF_TOKEN before --: arguments are seen by every user of the host",
    "--config": "give its flags themselves: a file cannot be judged",
    "--uds": "leave it out: the container publishes a port",
    "--host": "leave it out: the container's addresses are its own, and --port publishes them",
}  # fmt: skip
WATCHED = {*SHORT.values(), *MULTI_NODE, *OURS, *KV_CACHE, *ELSEWHERE, LENGTH, UTILIZATION, NAME,
           METHOD, TOKENS, "--max-num-batched-tokens", "--no-async-scheduling"}  # fmt: skip
# As vLLM's parser takes lengths: 128k is decimal, 128K binary.
UNITS = {"k": 10**3, "m": 10**6, "K": 1 << 10, "M": 1 << 20, "": 1}


def values(words: Sequence[str]) -> dict[str, str]:
    """The last value of each flag, by its long name; "" for a flag without one."""
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if not word.startswith("-"):
            if name:
                found[name] = f"{found[name]} {word}".strip()
            continue
        given, _, value = word.partition("=")
        name = _long_name(given)
        found[name] = value
    return found


def _long_name(given: str) -> str:
    if given in SHORT or not given.startswith("--"):
        return SHORT.get(given, given)
    name = given.replace("_", "-")
    near = [known for known in WATCHED if known.startswith(name)]
    return near[0] if name not in WATCHED and len(near) == 1 else name


def number(found: Mapping[str, str], name: str, default: int = 1) -> int:
    """The value of a flag that counts something."""
    text = found.get(name, str(default))
    digits = text.rstrip("kmKM")
    if re.fullmatch(r"[0-9]{1,9}", digits) and text[len(digits) :] in UNITS and int(digits):
        return int(digits) * UNITS[text[len(digits) :]]
    raise UsageError(f"invalid {name} {text!r}: expected a number of at least 1")


def length(found: Mapping[str, str], default: int) -> int | None:
    """The longest context; None where vLLM takes as much as fits (0.26.0, argparse_utils.py:75)."""
    return None if found.get(LENGTH) in {"auto", "-1"} else number(found, LENGTH, default)


@dataclass(frozen=True, kw_only=True)
class Drafter:
    """The checkpoint's own draft layer, switched on. ``tokens``: 0 if they are not given."""

    method: str  # mtp, dspark
    tokens: int


def drafter(words: Sequence[str]) -> Drafter | None:
    """What drafts under these arguments; None if nothing does, or not a layer of the checkpoint."""
    method, tokens = speculation(words)
    return Drafter(method=DRAFTERS[method], tokens=tokens) if method in DRAFTERS else None


def speculation(words: Sequence[str]) -> tuple[str, int]:
    """Method and number of drafted tokens under these arguments; "", 0 if they are not given."""
    found = values(words)
    try:
        config = json.loads(found.get(SPECULATION) or "{}")
        config = {name.replace("-", "_"): value for name, value in config.items()}
    except (ValueError, AttributeError):
        what = f"invalid {SPECULATION} {found[SPECULATION]!r}: expected an object in JSON"
        raise UsageError(what) from None
    parts = {"method": METHOD, "num_speculative_tokens": TOKENS}
    method, tokens = (
        found.get(flag) or found.get(f"{SPECULATION}.{name.replace('_', '-')}") or config.get(name)
        for name, flag in parts.items()
    )
    stated = str(tokens or 0)
    return str(method or ""), int(stated) if stated.isdecimal() else 0


def share(found: Mapping[str, str], default: float) -> float:
    """The part of a GPU's memory that vLLM may use."""
    text = found.get(UTILIZATION, str(default))
    if re.fullmatch(r"[0-9]*\.?[0-9]+", text) and 0 < float(text) <= 1:
        return float(text)
    raise UsageError(f"invalid {UTILIZATION} {text!r}: expected a number above 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How one server is spread over GPUs. Expert parallelism has no size: it uses the others'.

    vLLM 0.26.0, vllm/config/parallel.py:531 (world_size_across_dp): TP x PP x PCP x DP.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def text(self) -> str:
        """The sizes as flags, for messages."""
        flags = [f"--{SIZES[n]}={size}" for n in SIZES if (size := getattr(self, n)) > 1]
        return " x ".join(flags) or "one GPU"


def parallel(words: Sequence[str]) -> Parallel:
    """The sizes that arguments of ``vllm serve`` give; MultiNodeError if one host is not enough."""
    found = values(words)
    sizes = {field: number(found, f"--{name}") for field, name in SIZES.items()}
    local = number(found, "--data-parallel-size-local", sizes["data"])
    spread = [name for name in MULTI_NODE if name in found]
    if found.get("--nnodes") == "1":
        spread.remove("--nnodes")
    if local != sizes["data"]:
        spread.append("--data-parallel-size-local")
    if spread:
        what = f"one server on several hosts is not supported: {', '.join(spread)}"
        remedy = "take the flag out; for more capacity start a server on each host, or --replica N"
        raise MultiNodeError(what, remedy=remedy)
    return Parallel(**sizes)


def refuse_ours(words: Sequence[str]) -> None:
    """Refuse flags that serve sets itself, and what a terminal would not show as it is."""
    found = values(words)
    for name, remedy in OURS.items():
        if name in found:
            raise UsageError(f"{name} after -- is set by serve itself", remedy=remedy)
    if odd := [word for word in words if not word.replace("\n", "").isprintable()]:
        raise UsageError(f"control characters in {odd[0]!r} after --", remedy="take them out")
    if words and not words[0].startswith("-"):
        what = f"unexpected argument {words[0]!r} after --: expected flags of vllm serve"
        raise UsageError(what, remedy="the model is given by --artifact or --model")
