"""One start of a server, measured: warm-up, window, counters, caches, the client's headroom."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from vllm_forge.bench.client import Answer, Prompt, ask_all, read_counters
from vllm_forge.bench.errors import InvalidResultError, WorkloadFileError
from vllm_forge.bench.hardware import gpu_states
from vllm_forge.bench.results import (
    LARGEST_ROWS,
    Arm,
    Counters,
    Drafts,
    Row,
    Start,
    Window,
    read_arm,
    write_arm,
)
from vllm_forge.bench.validity import require_valid
from vllm_forge.errors import first_problem
from vllm_forge.host import HostProbe, Probe, console, parse_json, printable, read_plain
from vllm_forge.host.console import PROGRESS_S
from vllm_forge.matrix import flags

SELF_TEST = 4  # requests for each slot, in the test of the client


def read_workload(path: Path) -> tuple[list[Prompt], str]:
    """Prompts of JSONL (``item``, and ``prompt`` or ``messages``), and the file's hash."""
    prompts, where = [], str(path)
    try:
        content = read_plain(path)
        for number, line in enumerate(content.splitlines(), 1):
            where = f"{path}:{number}"
            if line.strip():
                prompts.append(_prompt(parse_json(line)))
    except FileNotFoundError:
        problem = "file not found"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"{error!r}"
    else:
        if prompts and len({(row.item, row.repeat) for row in prompts}) == len(prompts):
            return prompts, hashlib.sha256(content).hexdigest()
        problem = "two rows have one item" if prompts else "it is empty"
    what = f"invalid workload: {problem}"
    remedy = 'give JSONL with {"item": NAME, "prompt": TEXT} or "messages" in each line'
    raise WorkloadFileError(what, where=where, remedy=remedy)


def _prompt(row: Any) -> Prompt:
    content = row["messages"] if "messages" in row else row["prompt"]
    if not content:
        raise ValueError("an empty prompt")
    if not isinstance(row["item"], str):
        raise TypeError("item is not a text")
    ids = all(isinstance(token, int) for token in content)
    chat = not ids and not isinstance(content, str)
    if chat and not all(isinstance(message["content"], str) for message in content):
        raise ValueError("a message without text")
    predicted = {int(k): Drafts.model_validate(d) for k, d in row.get("predicted", {}).items()}
    if type(repeat := row.get("repeat", 0)) is not int:
        raise TypeError("repeat is not an integer")
    return Prompt(printable(row["item"]), content, predicted, repeat)


def _predicted(prompts: Sequence[Prompt], argv: Sequence[str]) -> Drafts | None:
    """The sum over prompts, for as many drafted tokens as the server's arguments say."""
    config = flags.values(argv).get(flags.SPECULATION)
    k = parse_json(config)["num_speculative_tokens"] if config else 0
    rows = [prompt.predicted.get(k) for prompt in prompts]
    known = [row for row in rows if row is not None]
    if not known or len(known) < len(rows):
        return None
    places = zip(*(row.per_position for row in known), strict=True)
    return Drafts(drafts=sum(row.drafts for row in known), per_position=tuple(map(sum, places)))


def read_answers(path: Path, items: Collection[str]) -> list[Row]:
    """Scored answers of another harness, JSONL of `Row`; WorkloadFileError if items are unknown."""
    try:
        lines = read_plain(path, LARGEST_ROWS).splitlines()
        rows = [Row.model_validate(parse_json(line)) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        problem = first_problem(error) if isinstance(error, ValueError) else f"{error!r}"
    else:
        unknown = sorted({row.item for row in rows} - set(items))
        if rows and not unknown and not any(row.start for row in rows):
            return rows
        problem = f"items that the workload lacks: {unknown[:3]}" if unknown else "expected start 0"
    what = f"invalid answers: {problem}"
    remedy = 'give JSONL with "item", "finish", "output_tokens", "seconds", "scores" in each line'
    raise WorkloadFileError(what, where=str(path), remedy=remedy)


def client_rate(arm: dict[str, Any], prompts: Sequence[Prompt]) -> float:
    """Tokens a second of this client against a server that answers at once."""
    argv = [sys.executable, "-m", "vllm_forge.bench.null_server"]  # ends with its standard input
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        port = process.stdout.readline().strip() if process.stdout else ""
        conditions = arm["conditions"]
        some = prompts[: SELF_TEST * conditions.concurrency]
        seconds, answers = ask_all(f"http://127.0.0.1:{port}", "null", some, conditions)
    return sum(answer.tokens for answer in answers) / seconds


def measure(
    url: str, model: str, arm: dict[str, Any], prompts: Sequence[Prompt], *, warm: int,
    order: int, caches: Sequence[Path], client: Callable[..., float] | None = None,
    probe: Probe | None = None,
) -> tuple[Start, list[Row]]:  # fmt: skip
    """Warm up with the first ``warm`` prompts, which are not measured, then ask the others.

    A prompt that is both warmed up and measured would hit the prefix cache.
    """
    conditions, probe = arm["conditions"], probe or HostProbe()
    ask_all(url, model, prompts[:warm], conditions)
    measured, gpus = prompts[warm:], gpu_states(probe)
    files, before = _files(caches), read_counters(url)
    seconds, answers = ask_all(url, model, measured, conditions, progress(len(measured)))
    gpus_after = gpu_states(probe)
    after = read_counters(url, before.tokens, sum(answer.tokens for answer in answers))
    rate = sum(answer.tokens for answer in answers) / seconds
    window = Window(
        seconds=seconds,
        before=before,
        after=after,
        new_files=tuple(printable(name) for name in sorted(_files(caches) - files)),
        headroom=(client or client_rate)(arm, measured) / rate if rate else 0.0,
        predicted=_predicted(measured, arm["server"].argv),
        gpus_before=gpus,
        gpus_after=gpus_after,
    )
    return Start(order=order, window=window), [_row(answer, before, after) for answer in answers]


def add_start(path: Path, arm: dict[str, Any], start: Start, rows: Sequence[Row]) -> None:
    """Add a start to a record, or make it; InvalidResultError, and nothing written, for faults."""
    starts, kept = [start], list(rows)
    if path.exists():
        old = read_arm(path)
        require_same(old, arm)
        starts = [*old.result.starts, start]
        number = len(old.result.starts)
        kept = [*old.rows, *(row.model_copy(update={"start": number}) for row in rows)]
    record = {**arm, "starts": starts}
    write_arm(path, record, kept, check=require_valid)


def require_same(old: Arm, arm: dict[str, Any]) -> None:
    """InvalidResultError unless a record's fields are those of an arm."""
    for key, value in arm.items():
        if getattr(old.result, key) != value:
            raise InvalidResultError(
                f"the record is of another {key}",
                where=str(old.path),
                remedy="measure all starts of a record alike, or give another --output",
            )


def _row(answer: Answer, before: Counters, after: Counters) -> Row:
    drafts = after.drafts - before.drafts
    depth = (after.draft_tokens - before.draft_tokens) // drafts if drafts > 0 else 0
    steps = answer.chunks[1:]  # the first token is the prompt's
    accepted = answer.tokens - len(answer.chunks) if depth else 0
    return Row(
        start=0,
        item=answer.item,
        repeat=answer.repeat,
        finish=answer.finish,
        output_tokens=answer.tokens,
        seconds=answer.seconds,
        ttft=answer.ttft,
        # A chunk of several steps has more tokens than its drafts: validity compares the counters.
        drafted=max(depth * len(steps), accepted),
        accepted=accepted,
        positions=tuple(sum(size > place + 1 for size in steps) for place in range(depth)),
    )


def count_compiled(caches: Sequence[Path]) -> int:
    """Files of JIT compilers; those beside the compilers' folders are of others."""
    names = _files(caches)
    return sum(Path(name).parent not in caches for name in names)


def _files(folders: Sequence[Path]) -> set[str]:
    return {str(path) for folder in folders for path in folder.rglob("*") if path.is_file()}


def progress(total: int, unit: str = "requests") -> Callable[[object], None]:
    """A function to call after each: it shows what is done, and the time left, now and then."""
    begin = shown = time.monotonic()
    done = 0

    def advance(_: object) -> None:
        nonlocal shown, done
        done += 1
        now = time.monotonic()
        if now - shown >= PROGRESS_S:
            shown = now
            left = (total - done) * (now - begin) / done
            console.print(f"  {done} of {total} {unit}, {left:.0f} s left", style="dim")

    return advance
