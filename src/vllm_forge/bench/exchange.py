"""Results for and from other tools: `vllm bench serve`, PyTorch's benchmark records, GuideLLM.

Figures have the names that `vllm bench serve` writes (0.26.0, vllm/benchmarks/serve.py:1194-1290).
GuideLLM's "time per output token" has the first one in it, so TPOT is taken from its inter-token
latency.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import validate_call
from scipy import stats

from vllm_forge.bench.errors import (
    CrossCheckFailedError,
    GateUndecidedError,
    InvalidResultError,
    ResultFileError,
)
from vllm_forge.bench.results import Arm, Number, Window
from vllm_forge.bench.statistics import LEVEL
from vllm_forge.host import printable, read_data
from vllm_forge.host.files import file_digest
from vllm_forge.matrix.model import Text

RATE, LENGTH = "output_throughput", "mean_output_tokens"
ACCEPTANCE, POSITIONS = "spec_decode_acceptance_rate", "spec_decode_per_position_acceptance_rates"
TTFT, TPOT = "mean_ttft_ms", "mean_tpot_ms"
ROUNDING = 1e-9  # relative, of figures that must be equal
LARGEST = 1e15  # of a figure
UNITS = 0.01  # relative, by which tokens over seconds may differ from the rate of the same file
Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What another tool says of one cell."""

    tool: str
    concurrency: int | None
    answers: int
    failed: int
    figures: Figures


@validate_call
def check(figure: Text, own: Number, other: Number, bound: Number | None) -> dict[str, Any]:
    """A figure of both; ``bound``: of their difference, None if one start says nothing of it."""
    difference = other - own
    agrees = None if bound is None else abs(difference) <= bound + ROUNDING * abs(own)
    return {"figure": figure, "own": own, "other": other, "bound": bound,
            "difference": difference, "agrees": agrees}  # fmt: skip


def vllm_document(arm: Arm, index: int) -> dict[str, Any]:
    """A start of a valid record as `vllm bench serve` writes it, without what was not measured."""
    rows, seconds = arm.of_start(index), _window(arm, index).seconds
    return {
        "backend": "openai",
        "label": arm.result.arm,
        "model_id": arm.result.server.artifact,
        "image": arm.result.server.image,
        "num_prompts": len(rows),
        "request_rate": "inf",
        "max_concurrency": arm.result.conditions.concurrency,
        "duration": seconds,
        "completed": len(rows),
        "failed": 0,
        "total_output_tokens": sum(row.output_tokens for row in rows),
        "request_throughput": len(rows) / seconds,
        "output_lens": [row.output_tokens for row in rows],
        "ttfts": [row.ttft for row in rows],
        **_figures(arm, index),
    }


def pytorch_records(arm: Arm) -> list[dict[str, Any]]:
    """A record for each figure, with a value for each start (vllm/benchmarks/lib/utils.py:41)."""
    result, runs = arm.result, [_figures(arm, index) for index in range(len(arm.result.starts))]
    extra = {"args": list(result.server.argv), "image": result.server.image,
             "conditions": result.conditions.model_dump(mode="json")}  # fmt: skip
    return [
        {
            "benchmark": {"name": "vLLM benchmark", "extra_info": extra},
            "model": {"name": result.server.artifact},
            "metric": {"name": name, "benchmark_values": values,
                       "extra_info": {"arm": result.arm, "gpu": result.server.gpu}},
        }
        for name, values in _shared(runs).items()
        if not isinstance(values[0], list)
    ]  # fmt: skip


def read_run(path: Path) -> Run:
    """One cell of `vllm bench serve` or GuideLLM, by its JSON; ResultFileError."""
    remedy = "give the JSON of `vllm bench serve --save-result`, or of `guidellm run` (0.8.1)"
    return read_data(path, _parse, ResultFileError, what="result of another tool", remedy=remedy)


def crosscheck(arm: Arm, paths: Sequence[Path]) -> dict[str, Any]:
    """Rows of both figures, their difference and its bound; InvalidResultError: other conditions.

    ``paths``: a result for each start, in their order, or a single one, which is one more start:
    its bound is the prediction interval of one.
    """
    runs = [read_run(path) for path in paths]
    for run, path in zip(runs, paths, strict=True):
        _require_same(arm, run, path)
    _require_each(arm, runs, paths)
    own = _shared([_flat(_figures(arm, index)) for index in range(len(arm.result.starts))])
    others = _shared([run.figures for run in runs])
    rows = [
        check(name, _mean(own[name]), _mean(values), _bound(own[name], values))
        for name, values in others.items()
        if name in own
    ]
    files = {arm.path.name: file_digest(arm.path)}
    return {
        "tool": runs[0].tool,
        "image": arm.result.server.image,
        "files": files | {"/".join(one.parts[-2:]): file_digest(one) for one in paths},
        "rows": rows,
    }


def require_agreement(record: Mapping[str, Any]) -> None:
    """CrossCheckFailedError, or GateUndecidedError where no bound is known."""
    names = {word: [row["figure"] for row in record["rows"] if row["agrees"] is word]
             for word in (False, None)}  # fmt: skip
    if names[False]:
        what = f"{record['tool']} and the record differ: {', '.join(names[False])}"
        remedy = "check that both asked the same prompts of the same server"
        raise CrossCheckFailedError(what, remedy=remedy)
    if names[None] or not record["rows"]:
        what = "one start says nothing of how much starts differ"
        raise GateUndecidedError(what, remedy="measure the record with two or more starts")


def _window(arm: Arm, index: int) -> Window:
    if (window := arm.result.starts[index].window) is None:
        what = f"start {index} has answers only: its time was not measured"
        raise InvalidResultError(what, where=arm.path, remedy="measure it by `bench serve`")
    return window


def _figures(arm: Arm, index: int) -> dict[str, Any]:
    rows, window = arm.of_start(index), _window(arm, index)
    tokens = sum(row.output_tokens for row in rows)
    figures: dict[str, Any] = {
        RATE: tokens / window.seconds,
        LENGTH: tokens / len(rows),
        **_distribution("ttft_ms", [row.ttft for row in rows]),
        **_distribution("tpot_ms", [row.tpot for row in rows]),
        **_distribution("e2el_ms", [row.seconds for row in rows]),
    }
    change = window.change
    if drafts := change["drafts"]:
        figures |= {
            ACCEPTANCE: change["accepted"] / change["draft_tokens"] * 100,
            "spec_decode_acceptance_length": 1 + change["accepted"] / drafts,
            "spec_decode_num_drafts": drafts,
            "spec_decode_draft_tokens": change["draft_tokens"],
            "spec_decode_accepted_tokens": change["accepted"],
            POSITIONS: [count / drafts for count in change["per_position"]],
        }
    return figures


def _distribution(name: str, seconds: Sequence[float | None]) -> Figures:
    """In milliseconds, of those that are known."""
    numbers = 1000 * np.asarray([value for value in seconds if value is not None])
    if not len(numbers):
        return {}
    return {
        f"mean_{name}": float(numbers.mean()),
        f"median_{name}": float(np.median(numbers)),
        f"std_{name}": float(numbers.std()),
        f"p99_{name}": float(np.percentile(numbers, 99)),
    }


def _shared(starts: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values of each figure that all starts have."""
    names = [name for name in starts[0] if all(name in start for start in starts)]
    return {name: [start[name] for start in starts] for name in names}


def _flat(figures: Mapping[str, Any]) -> Figures:
    """The rates by position, each by its own name."""
    places = enumerate(figures.get(POSITIONS, ()))
    rates = {f"acceptance_at_position_{place}": rate for place, rate in places}
    return {k: v for k, v in figures.items() if not isinstance(v, list)} | rates


def _parse(document: Any) -> Run:
    if not isinstance(document, dict):
        raise ValueError("expected an object with a result")  # noqa: TRY004 - read_data reports it
    run = _guidellm(document) if "benchmarks" in document else _vllm(document)
    if missing := [name for name in (RATE, TTFT, TPOT) if name not in run.figures]:
        raise ValueError(f"no number {missing[0]}")
    for name, value in run.figures.items():
        if type(value) not in {int, float} or not 0 <= value <= LARGEST:
            raise ValueError(f"{name} is not a number of 0 to {LARGEST:g}")
    return run


def _vllm(document: Mapping[str, Any]) -> Run:
    names = (RATE, TTFT, TPOT, ACCEPTANCE, POSITIONS)
    known = {name: document[name] for name in names if name in document}
    answers, tokens = _count(document, "completed"), _count(document, "total_output_tokens")
    seconds, rate = document.get("duration"), document.get(RATE, 0)
    if seconds is not None and not math.isclose(tokens / seconds, rate, rel_tol=UNITS):
        raise ValueError(f"{RATE} is {rate}, not {tokens} tokens in {seconds} s")
    return Run(
        tool="vllm bench serve",
        concurrency=document["max_concurrency"],
        answers=answers,
        failed=_count(document, "failed"),
        figures={LENGTH: tokens / max(1, answers), **_flat(known)},
    )


def _count(document: Mapping[str, Any], name: str) -> int:
    if type(count := document[name]) is not int or count < 0:
        raise ValueError(f"{name} is not a count")
    return count


def _guidellm(document: Mapping[str, Any]) -> Run:
    if len(document["benchmarks"]) != 1:
        raise ValueError(f"expected one benchmark, not {len(document['benchmarks'])}")
    (benchmark,) = document["benchmarks"]
    metrics, totals = benchmark["metrics"], benchmark["metrics"]["request_totals"]
    asked = benchmark["requests"]["successful"]
    latencies = [row["inter_token_latency_ms"] for row in asked if row["output_tokens"] > 1]
    tokens = [row["output_tokens"] for row in asked]
    return Run(
        tool=printable(f"guidellm {document['metadata']['guidellm_version']}"[:40]),
        concurrency=benchmark["config"]["strategy"].get("streams"),
        answers=_count(totals, "successful"),
        failed=_count(totals, "errored") + _count(totals, "incomplete"),
        figures={
            LENGTH: math.fsum(tokens) / len(tokens),
            RATE: metrics["output_tokens_per_second"]["successful"]["mean"],
            TTFT: metrics["time_to_first_token_ms"]["successful"]["mean"],
            TPOT: math.fsum(latencies) / len(latencies),
        },
    )


def _require_same(arm: Arm, run: Run, path: Path) -> None:
    level, answers = arm.result.conditions.concurrency, len(arm.of_start(0))
    faults = [
        f"{run.failed} requests of {run.tool} failed" if run.failed else "",
        f"concurrency {run.concurrency} against {level}" if run.concurrency != level else "",
        f"{run.answers} answers against {answers}" if run.answers != answers else "",
    ]
    if any(faults):
        what = "; ".join(filter(None, faults))
        remedy = "ask the measured prompts once, at the record's concurrency"
        raise InvalidResultError(what, where=f"{arm.path}, {path}", remedy=remedy)


def _require_each(arm: Arm, runs: Sequence[Run], paths: Sequence[Path]) -> None:
    """InvalidResultError for a number of results that is not that of starts, or a copy."""
    starts, digests = len(arm.result.starts), {file_digest(path) for path in paths}
    fault = ""
    if len(paths) not in {1, starts}:
        fault = f"{len(paths)} results for {starts} starts"
    elif len(digests) != len(paths) or len({run.tool for run in runs}) > 1:
        fault = "results of two tools, or one result twice"
    if fault:
        remedy = "give a result of one tool for each start, in their order, or a single one"
        raise InvalidResultError(fault, where=arm.path, remedy=remedy)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _bound(starts: list[float], others: list[float]) -> float | None:
    """Within which another start would be; of pairs, within which their mean difference is."""
    if len(starts) == 1:
        return None
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(starts) - 1))
    if len(others) == 1:
        return reach * float(np.std(starts, ddof=1)) * math.sqrt(1 + 1 / len(starts))
    differences = np.asarray(others) - np.asarray(starts)
    return reach * float(differences.std(ddof=1)) / math.sqrt(len(starts))
