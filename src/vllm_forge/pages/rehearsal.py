"""What a rehearsal measured, beside what ``plan`` and ``doctor`` foretold of its memory."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_forge.pages.markdown import table
from vllm_forge.project import Project
from vllm_forge.receipts.receipt import Receipt
from vllm_forge.receipts.suite import read_suite
from vllm_forge.receipts.verification import NOT_RUN, read_receipts
from vllm_forge.serve.deployment import find_deployment, recorded_rows
from vllm_forge.serve.memory import GIB, Memory

TIER = "rehearsal"  # of the GPU suite
UNKNOWN = "unknown"
Place = tuple[str, str, str, str]  # SKU, line, preset, artifact
Facts = Mapping[str, Any]  # of tests/gpu/rehearsal
# Column -> fact.
TIMES = {
    "healthy, s": "ready_s",
    "weights loaded, s": "load_s",
    "graphs, s": "capture_s",
    "graphs, GiB": "graphs_gib",
    "engine's start, s": "init_s",
    "first token, s": "first_token_s",
    "tokens/s of 1 client": "1 clients",
    "of 4": "4 clients",
    "of 16": "16 clients",
    "acceptance (declared)": "acceptance",
    "compiled files": "compiled",
}


def rehearsals(project: Project) -> str:
    """Memory of each deployment that was rehearsed, or that can be; then times and speed."""
    runs = measured(read_receipts(project).valid)
    head = ["SKU", "line", "preset", "artifact", "per GPU", "foretold", "measured", "difference"]
    rows = [
        [*place, *row]
        for place in runs or _rehearsable(project)
        for row in compare(_memory(project, place), runs.get(place, {}))
    ]
    times = [
        [*place, *(_first(facts, key) for key in TIMES.values())] for place, facts in runs.items()
    ]
    text = table(head, rows)
    return f"{text}\n\n{table([*head[:4], *TIMES], times)}" if times else text


def measured(receipts: Sequence[Receipt]) -> dict[Place, dict[str, Any]]:
    """What valid receipts of the tier say of each deployment that was served."""
    runs: dict[Place, dict[str, Any]] = {}
    for receipt in receipts:
        detail = receipt.statement.detail
        for test in detail.tests.values() if detail.tier == TIER else ():
            if not {"preset", TIER} <= test.facts.keys():
                continue
            place = (detail.sku, detail.line, test.facts["preset"], test.facts[TIER])
            speed = {f"{test.facts.get('together')} clients": test.facts.get("tokens_per_s")}
            runs.setdefault(place, {}).update({**test.facts, **speed})
    return runs


def _rehearsable(project: Project) -> Iterator[Place]:
    """Deployments on the default line for the tier's GPUs, of artifacts whose shards are known."""
    matrix, line = project.matrix, project.matrix.default_line
    gpus = read_suite(project.root).tier[TIER].gpus
    for name, preset in matrix.preset.items():
        for artifact in preset.artifacts if preset.tensor_parallel == gpus else ():
            if matrix.artifact[artifact].shards is not None:
                yield preset.sku, line, name, artifact


def _memory(project: Project, place: Place) -> Memory | None:
    sku, line, preset, artifact = place
    deployment = find_deployment(project.matrix, project.cell(sku, line), preset, artifact)
    return deployment.memory(recorded_rows(project, line))


def compare(memory: Memory | None, facts: Facts) -> Iterator[list[str]]:
    """What, foretold, measured and difference; measured is what vLLM's first rank logs."""
    weights, cache, requests = (
        float(facts[name][0]) if name in facts else None
        for name in ("weights_gib", "kv_cache_gib", "concurrency")
    )
    request = cache / requests if cache is not None and requests else None
    kv = None if memory is None else _gib(memory.kv_cache)
    yield _row("weights, GiB", None if memory is None else _gib(memory.weights), weights)
    yield _row("KV cache of the longest request, GiB", kv, request)
    rest = None
    if memory is not None and weights is not None and cache is not None:
        rest = memory.requested / GIB - weights - cache
    left = None if memory is None or kv is None else _gib(memory.left)
    yield [*_row("left for all else, GiB; taken by it", left, rest)[:3], ""]


def _gib(size: int | None) -> float | None:
    return None if size is None else size / GIB


def _row(what: str, foretold: float | None, found: float | None) -> list[str]:
    shown = UNKNOWN if foretold is None else f"{foretold:.2f}"
    if found is None:
        return [what, shown, NOT_RUN, ""]
    return [what, shown, f"{found:.2f}", f"{found / foretold - 1:+.1%}" if foretold else ""]


def _first(facts: Facts, key: str) -> str:
    """A value for a table: of a log its first one, of files by compiler their number."""
    value = facts.get(key, UNKNOWN)
    if isinstance(value, dict):
        return str(sum(value.values()))
    return str(value[0] if isinstance(value, list | tuple) else value)
