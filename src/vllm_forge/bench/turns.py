"""Run a plan: a fresh server for each start, measured, ended; resumable by start.

    python -m vllm_forge.bench.turns FOLDER OUTPUT [NAME]... [--retry]

FOLDER has a folder with plan.json and prompts for each session. What an image has is enough:
aiohttp, pydantic, rich.
"""

import argparse
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from vllm_forge.bench.client import Prompt, is_healthy
from vllm_forge.bench.errors import ServerStartError, SessionFileError, StartFailedError
from vllm_forge.bench.hardware import kernels_of, listed_gpus
from vllm_forge.bench.measure import add_start, count_compiled, measure, read_workload
from vllm_forge.bench.quality import Answers, Header, answers_path, ask
from vllm_forge.bench.results import Count, Seconds, Setup, make_arm, read_arm
from vllm_forge.bench.session import UNKNOWN, Launch, Plan, read_plan
from vllm_forge.bench.validity import require_valid
from vllm_forge.errors import ForgeError
from vllm_forge.host import HostProbe, Probe, console, printable, read_data, remove, write_json
from vllm_forge.host.errors import FileAccessError
from vllm_forge.host.probe import Gpu
from vllm_forge.host.run import Runner, background
from vllm_forge.matrix import FrozenModel
from vllm_forge.matrix.model import Name

JOURNAL, LOGS, CROSSCHECKS = "session.json", "logs", "crosscheck"
POLL_S = 0.5
CROSSCHECK_S = 600.0
LISTENING = "0A"  # state of a socket in /proc/net/tcp
TAIL = 2000  # bytes of a log that a message shows


class Attempt(FrozenModel):
    """A start that was begun. One that is still "running" in the file was interrupted."""

    order: Count
    arm: Name
    state: Literal["running", "done", "failed", "interrupted"]
    began: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:+]+$")]
    seconds: Seconds = 0
    error: str = ""


class Journal(FrozenModel):
    format: Literal["bench-session/1"] = "bench-session/1"
    plan_sha256: str
    concurrency: tuple[Count, ...] = ()  # of the plan; none in older lists
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    plan: Plan
    output: Path
    parts: Sequence[list[Prompt]]  # of each concurrency
    gpu: Gpu
    probe: Probe

    def cells(self, order: int) -> list[tuple[Path, Setup, list[Prompt]]]:
        """Of each concurrency: the record of a start, what is measured, and its prompts."""
        plan, name = self.plan, self.plan.turns[order]
        known = {"gpu": self.gpu.name, "driver": self.gpu.driver or UNKNOWN}
        server = plan.arms[name].server.model_copy(update=known)
        cells = []
        for one, prompts in zip(plan.conditions, self.parts, strict=True):
            path = record_path(self.output, name, one.concurrency)
            setup = Setup(arm=name, session=plan.session, conditions=one, server=server,
                          differs=plan.differs)  # fmt: skip
            cells.append((path, setup, prompts))
        return cells

    def start(self, order: int) -> None:
        """One start at every concurrency; its rows are kept only if all are valid."""
        plan, name = self.plan, self.plan.turns[order]
        caches = [Path(cache) for cache in plan.caches]
        for place in plan.arms[name].env.values():  # not every compiler makes its folder
            if any(Path(place).is_relative_to(cache) for cache in caches):
                Path(place).mkdir(parents=True, exist_ok=True)
        cached = count_compiled(caches)
        log = self.output / LOGS / f"{order:02}-{name}.log"
        with serving(plan.arms[name], plan, log) as ready_s:
            if plan.quality is not None:
                self._ask(order, plan.quality.license)
                return
            # A server gets faster by what it was asked: we and the other tool begin in turns.
            after = plan.turns[:order].count(name) % 2 == 0
            if not after:
                self._crosscheck(order)
            measured = [
                (path, setup, *measure(
                    plan.url, plan.arms[name].model, setup, prompts, warm=plan.warm, order=order,
                    caches=caches, probe=self.probe,
                ))
                for path, setup, prompts in self.cells(order)
            ]  # fmt: skip
            if after:
                self._crosscheck(order)
        compiled = count_compiled(caches) - cached
        facts = {"ready_s": ready_s, "cached": cached, "compiled": max(0, compiled),
                 "kernels": kernels_of(log)}  # fmt: skip
        for path, setup, start, rows in measured:
            known = start.model_copy(update=facts)
            require_valid(make_arm(path, setup, [known], rows)[0])
        for path, setup, start, rows in measured:
            # A run that was ended between two records has the start in the first one already.
            if not _has_start(path, order):
                add_start(path, setup, start.model_copy(update=facts), rows)

    def require_kept(self, order: int) -> None:
        """SessionFileError unless the records have a start that is done."""
        for record, *_ in self.cells(order):
            path = answers_path(record, order) if self.plan.quality else record
            if not (path.exists() and (self.plan.quality or _has_start(path, order))):
                what = f"start {order} is done, but its record does not have it"
                remedy = "restore the record, or give another output folder"
                raise SessionFileError(what, where=path, remedy=remedy)

    def _crosscheck(self, order: int) -> None:
        """Run the other tool; what it cannot do costs its result, not ours."""
        tool = self.plan.crosscheck
        if tool is None or tool.arm != self.plan.turns[order]:
            return
        folder = self.output.resolve() / CROSSCHECKS / f"{order:02}"
        remove(folder)  # of a start that did not end
        folder.mkdir(parents=True)
        words = [word.replace("{output}", str(folder)) for word in tool.command]
        try:
            Runner().run(words, env=self.plan.arms[tool.arm].env, seconds=CROSSCHECK_S)
        except ForgeError as error:
            console.print(printable(f"no crosscheck: {error}"), markup=False)

    def _ask(self, order: int, license_: str) -> None:
        """Keep the answers to all questions, for `bench score` on a host with a sandbox."""
        model = self.plan.arms[self.plan.turns[order]].model
        for record, setup, prompts in self.cells(order):
            path = answers_path(record, order)
            remove(path)  # of a start that did not end
            header = Header(model=model, license=license_, arm=setup)
            ask(self.plan.url, prompts, Answers(path, header))


def run_plan(
    folder: Path, output: Path, *, retry: bool = False, probe: Probe | None = None
) -> None:
    """Do what is left of a plan. A start that fails is written down, and ends the run.

    ``retry``: repeat starts that failed before; else StartFailedError.
    """
    plan = read_plan(folder)
    prompts, digest = read_workload(folder / plan.workload)
    asked = plan.quality.prompts_sha256 if plan.quality else plan.conditions[0].prompts_sha256
    if digest != asked:
        what = "the prompts are not those of the plan"
        remedy = "restore them, or make the plan again"
        raise SessionFileError(what, where=folder / plan.workload, remedy=remedy)
    journal = _read_journal(output / JOURNAL, plan, retry=retry)
    probe, parts = probe or HostProbe(), _parts(plan, prompts, folder)
    run = Run(plan=plan, output=output, parts=parts, gpu=listed_gpus(probe)[0], probe=probe)
    (output / LOGS).mkdir(parents=True, exist_ok=True)
    for order in range(len(plan.turns)):
        if any(row.order == order and row.state == "done" for row in journal.attempts):
            run.require_kept(order)
            continue
        journal = _attempt(journal, output / JOURNAL, order, run)
        _say(journal, plan, order)


def _has_start(record: Path, order: int) -> bool:
    starts = read_arm(record).result.starts if record.exists() else ()
    return any(start.order == order for start in starts)


def record_path(output: Path, arm: str, concurrency: int) -> Path:
    return output / f"{arm}-c{concurrency}.json"


def result_paths(
    output: Path, turns: Sequence[str], concurrency: Sequence[int], *, quality: bool
) -> list[Path]:
    """Records of each arm and concurrency; of quality, the answers of each start."""
    if not quality:
        return [record_path(output, arm, c) for arm in dict.fromkeys(turns) for c in concurrency]
    return [
        answers_path(record_path(output, arm, c), order)
        for order, arm in enumerate(turns)
        for c in concurrency
    ]


def _parts(plan: Plan, prompts: list[Prompt], folder: Path) -> list[list[Prompt]]:
    """Prompts of each concurrency: no prompt is asked twice, which would hit the prefix cache.

    Questions about quality are all asked at each.
    """
    if plan.quality is not None:
        return [prompts] * len(plan.conditions)
    size = len(prompts) // len(plan.conditions)
    if size <= plan.warm:
        what = f"{len(prompts)} prompts are too few: {plan.warm} warm up each concurrency"
        remedy = "give more prompts, or a smaller warm"
        raise SessionFileError(what, where=folder / plan.workload, remedy=remedy)
    return [prompts[size * place : size * (place + 1)] for place in range(len(plan.conditions))]


def _read_journal(path: Path, plan: Plan, *, retry: bool) -> Journal:
    if not path.exists():
        levels = tuple(one.concurrency for one in plan.conditions)
        return Journal(plan_sha256=plan.digest, concurrency=levels)
    remedy = "give another output folder"
    journal: Journal = read_data(
        path, Journal.model_validate, SessionFileError, what="list of starts", remedy=remedy
    )
    if journal.plan_sha256 != plan.digest:
        what = "the folder has the results of another plan"
        raise SessionFileError(what, where=path, remedy=remedy)
    attempts = tuple(
        row.model_copy(update={"state": "interrupted"}) if row.state == "running" else row
        for row in journal.attempts
    )
    last = {row.order: row for row in attempts}
    if not retry and (failed := [row for row in last.values() if row.state == "failed"]):
        row = min(failed, key=lambda row: row.order)
        what = f"start {row.order} of arm {row.arm} failed before: {row.error}"
        remedy = "remove the cause and add --retry; the failed attempt stays in the file"
        raise StartFailedError(what, where=path, remedy=remedy)
    return journal.model_copy(update={"attempts": attempts})


def _attempt(journal: Journal, path: Path, order: int, run: Run) -> Journal:
    """One start; write down that it was begun, and how it ended."""
    begin = time.monotonic()
    began = datetime.now(UTC).isoformat(timespec="seconds")
    row = Attempt(order=order, arm=run.plan.turns[order], state="running", began=began)

    def keep(state: str, error: str = "") -> Journal:
        seconds = round(time.monotonic() - begin, 1)
        last = row.model_copy(update={"state": state, "seconds": seconds, "error": error})
        known = journal.model_copy(update={"attempts": (*journal.attempts, last)})
        write_json(path, known.model_dump(mode="json"))
        return known

    keep("running")
    try:
        run.start(order)
    except ForgeError as error:
        keep("failed", printable(f"{type(error).__name__}: {error.what}"))
        raise
    except KeyboardInterrupt:
        keep("interrupted")
        raise
    return keep("done")


@contextmanager
def serving(launch: Launch, plan: Plan, log: Path) -> Iterator[float]:
    """A fresh server, alone on its port; yields the seconds until it answered. ServerStartError."""
    with _port(plan):
        try:
            with background(launch.argv, env=launch.env, log=log) as process:
                ready_s = _wait(process, plan, log)
                _require_alone(plan, proxied=bool(launch.remove))
                yield ready_s
                _require_alone(plan, proxied=bool(launch.remove))
        finally:
            if launch.remove:  # a client that was killed leaves its container behind
                subprocess.run(launch.remove, capture_output=True, check=False)


@contextmanager
def _port(plan: Plan) -> Iterator[None]:
    """The session's port, free when it is taken, until the server has ended. ServerStartError.

    A server needs a minute until it listens, and vLLM's lets others listen too (SO_REUSEPORT,
    0.26.0, entrypoints/openai/api_server.py:585): the kernel would then share out the requests. So
    a session holds a name, which exists once where its port does: in the network's namespace.
    """
    with socket.socket(socket.AF_UNIX) as name, socket.socket() as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            name.bind(f"\0vllm-forge-bench-{plan.port}")
            place.bind(("127.0.0.1", plan.port))
        except OSError:
            what = f"port {plan.port} is in use"
            remedy = "end the server or session that has it, or give this session another port"
            raise ServerStartError(what, where=plan.url, remedy=remedy) from None
        place.close()
        yield


def _require_alone(plan: Plan, *, proxied: bool) -> None:
    """ServerStartError if several sockets listen on the port.

    ``proxied``: by an engine, which has one in IPv4 and one in IPv6. One in IPv6 of a server that
    is not may take IPv4, too.
    """
    listening = 0
    for name in ("tcp", "tcp6"):
        table = Path("/proc/net", name)  # a host without IPv6 has one
        rows = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
        ports = [row[1].rpartition(":")[2] for row in rows if row[3] == LISTENING]
        listening = ports.count(f"{plan.port:04X}") + (0 if proxied else listening)
        if listening > 1:
            what = f"several servers listen on port {plan.port}: which one answered is unknown"
            remedy = "end the others, or give this session another port"
            raise ServerStartError(what, where=plan.url, remedy=remedy)


def _wait(process: "subprocess.Popen[bytes]", plan: Plan, log: Path) -> float:
    begin = time.monotonic()
    while not is_healthy(plan.url):
        seconds = time.monotonic() - begin
        problem = f"no answer in {plan.ready_s:g} s" if seconds > plan.ready_s else ""
        if (code := process.poll()) is not None:
            problem = f"it ended with {code}"
        if problem:
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - TAIL))
                tail = printable(file.read(TAIL).decode(errors="replace")).strip()
            what = f"the server did not start: {problem}\n{tail}"
            raise ServerStartError(what, where=log, remedy="see the end of its log above")
        time.sleep(POLL_S)
    return round(time.monotonic() - begin, 1)


def _say(journal: Journal, plan: Plan, order: int) -> None:
    done = [row for row in journal.attempts if row.state == "done"]
    left = (len(plan.turns) - len(done)) * statistics.fmean(row.seconds for row in done)
    text = f"start {order} of arm {done[-1].arm}: {done[-1].seconds:.0f} s"
    text += f"; {len(done)} of {len(plan.turns)} are done, about {left / 60:.1f} min left"
    console.print(text, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("vllm_forge.bench.turns", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="has a folder with plan.json for each session")
    parser.add_argument("output", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of sessions (default: all)")
    parser.add_argument("--retry", action="store_true", help="repeat starts that failed")
    args = parser.parse_args(argv)
    # The first process of a PID namespace ignores signals without a handler.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in args.names or sorted(path.name for path in args.folder.iterdir()):
            run_plan(args.folder / name, args.output / name, retry=args.retry)
    except ForgeError as error:
        print(
            f"{type(error).__name__} (exit {error.exit_code})\n{printable(str(error))}",
            file=sys.stderr,
        )
        return error.exit_code
    except OSError as error:  # no folder, or a full disk
        print(printable(f"cannot read or write a file: {error}"), file=sys.stderr)
        return FileAccessError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
