"""What tiers rehearsal and edges found, beside what ``plan``, ``doctor`` and lint foretold."""

from collections.abc import Iterator, Sequence

from pydantic import BaseModel, Field, ValidationError

from vllm_forge.errors import problems
from vllm_forge.host.files import GIB
from vllm_forge.matrix import gpus_of
from vllm_forge.pages.markdown import escape, table
from vllm_forge.project import Project
from vllm_forge.receipts.errors import ReceiptUnreadableError
from vllm_forge.receipts.receipt import Receipt
from vllm_forge.receipts.suite import read_cases, read_suite
from vllm_forge.receipts.verification import NOT_RUN, read_receipts, seal
from vllm_forge.serve.deployment import find_deployment, recorded_rows
from vllm_forge.serve.memory import Memory

REHEARSAL, EDGES = "rehearsal", "edges"  # of the GPU suite
# Facts of a test of edges; what is foretold is in tests/gpu/edges/rows.toml, which a unit test
# compares with what plan, doctor and lint compute.
FACTS = ("edge", "foretold", "measured")
UNKNOWN = "unknown"
Place = tuple[str, str, str, str]  # SKU, line, preset, artifact


class Facts(BaseModel):
    """What tests of tests/gpu/rehearsal recorded; lists are of a log, its first value first."""

    preset: str
    rehearsal: str  # the artifact
    weights_gib: tuple[float, ...] = ()
    kv_cache_gib: tuple[float, ...] = ()
    concurrency: tuple[float, ...] = ()
    load_s: tuple[float, ...] = ()
    capture_s: tuple[float, ...] = ()
    graphs_gib: tuple[float, ...] = ()
    init_s: tuple[float, ...] = ()
    ready_s: float | None = None
    first_token_s: float | None = None
    acceptance: float | None = None
    together: int = 0
    tokens_per_s: float | None = None
    compiled: dict[str, int] = Field(default_factory=dict)


# Column -> fact.
TIMES = {
    "healthy, s": "ready_s",
    "weights loaded, s": "load_s",
    "graphs, s": "capture_s",
    "graphs, GiB": "graphs_gib",
    "engine's start, s": "init_s",
    "first token, s": "first_token_s",
    "acceptance (declared)": "acceptance",
}
CLIENTS = (1, 4, 16)


def rehearsals(project: Project) -> str:
    """Memory of each deployment that was rehearsed, or that can be; then times and speed."""
    receipts = _receipts(project, REHEARSAL)
    runs = measured(receipts)
    head = ["SKU", "line", "preset", "artifact", "per GPU", "foretold", "measured", "difference"]
    rows = [
        [*place, *row]
        for place in runs or _rehearsable(project)
        for row in compare(_memory(project, place), runs.get(place, ()))
    ]
    text = table(head, rows)
    speeds = [f"tokens/s of {count}" for count in CLIENTS]
    columns = [*head[:4], *TIMES, *speeds, "compiled files"]
    times = [[*place, *_times(facts)] for place, facts in runs.items()]
    return "\n\n".join([text, table(columns, times), _vouched(receipts)]) if times else text


def edges(project: Project) -> str:
    """Each claim that shape decides, with both sides, of every valid receipt; or how many tests."""
    if not (receipts := _receipts(project, EDGES)):
        return f"{NOT_RUN}: {len(read_cases(project.root, EDGES))} tests of tier `{EDGES}`"
    rows = [
        [detail.sku, detail.line, *(escape(str(test.facts.get(name, ""))) for name in FACTS)]
        for detail in (receipt.statement.detail for receipt in receipts)
        for test in detail.tests.values()
        if FACTS[0] in test.facts
    ]
    return "\n\n".join([table(["SKU", "line", *FACTS], rows), _vouched(receipts)])


def _receipts(project: Project, tier: str) -> list[Receipt]:
    return [row for row in read_receipts(project).valid if row.statement.detail.tier == tier]


def _vouched(receipts: Sequence[Receipt]) -> str:
    return table(["receipt", "vouched for"], [[row.path.name, seal(row)] for row in receipts])


def measured(receipts: Sequence[Receipt]) -> dict[Place, list[Facts]]:
    """What receipts of the tier say of each deployment that was served.

    ReceiptUnreadableError: facts that no test of the tier records.
    """
    runs: dict[Place, list[Facts]] = {}
    for receipt in receipts:
        detail = receipt.statement.detail
        for name, test in detail.tests.items():
            try:
                facts = Facts.model_validate(test.facts)
            except ValidationError as error:
                what = f"invalid facts of {name}: {'; '.join(problems(error))}"
                remedy = "run the tier again, or delete the receipt"
                raise ReceiptUnreadableError(what, where=str(receipt.path), remedy=remedy) from None
            place = (detail.sku, detail.line, facts.preset, facts.rehearsal)
            runs.setdefault(place, []).append(facts)
    return runs


def _rehearsable(project: Project) -> Iterator[Place]:
    """Deployments on the default line for the tier's GPUs, of artifacts whose shards are known."""
    matrix, line = project.matrix, project.matrix.default_line
    gpus = read_suite(project.root).tier[REHEARSAL].gpus
    for name, preset in matrix.preset.items():
        for artifact in preset.artifacts if gpus_of(matrix, name) == gpus else ():
            if matrix.artifact[artifact].shards is not None:
                yield preset.sku, line, name, artifact


def _memory(project: Project, place: Place) -> Memory | None:
    sku, line, preset, artifact = place
    deployment = find_deployment(project.matrix, project.cell(sku, line), preset, artifact)
    return deployment.memory(recorded_rows(project, line))


def compare(memory: Memory | None, rows: Sequence[Facts]) -> Iterator[list[str]]:
    """What, foretold, measured and difference; measured is what vLLM's first rank logs."""
    weights, cache, requests = (
        _first(rows, name) for name in ("weights_gib", "kv_cache_gib", "concurrency")
    )
    yield _row("weights, GiB", None if memory is None else memory.weights / GIB, weights)
    yield _row("longest requests at once", _requests(memory, cache), requests)
    rest = None
    if memory is not None and weights is not None and cache is not None:
        rest = memory.requested / GIB - weights - cache
    left = None if memory is None or memory.kv_cache is None else memory.left / GIB
    yield [*_row("left for all else, GiB; taken by it", left, rest)[:3], ""]


def _requests(memory: Memory | None, cache: float | None) -> float | None:
    """Of the KV cache that a start measured; before one, of all that is left beside weights."""
    if memory is None or memory.pool is None or memory.max_model_len is None:
        return None
    available = memory.requested - memory.weights if cache is None else round(cache * GIB)
    return memory.pool.requests(available, memory.max_model_len)


def _row(what: str, foretold: float | None, found: float | None) -> list[str]:
    shown = UNKNOWN if foretold is None else f"{foretold:.2f}"
    if found is None:
        return [what, shown, NOT_RUN, ""]
    return [what, shown, f"{found:.2f}", f"{found / foretold - 1:+.1%}" if foretold else ""]


def _times(rows: Sequence[Facts]) -> Iterator[str]:
    values = [_first(rows, name) for name in TIMES.values()]
    speeds = {facts.together: facts.tokens_per_s for facts in rows}
    yield from (_shown(value) for value in [*values, *map(speeds.get, CLIENTS)])
    yield str(sum(sum(facts.compiled.values()) for facts in rows))


def _first(rows: Sequence[Facts], name: str) -> float | None:
    """The first value of a fact that a test recorded."""
    values = (getattr(facts, name) for facts in rows)
    value = next((value for value in values if value not in (None, ())), None)
    return value[0] if isinstance(value, tuple) else value


def _shown(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4g}"
